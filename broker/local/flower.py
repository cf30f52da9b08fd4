"""`python -m perllm.broker.local.flower`: Flower, as `perllm up` starts it, which no other web page can use.

Whoever reaches Flower may stop workers and revoke tasks through it. `perllm up` has it on loopback and asks for no
password, so a page from elsewhere in the developer's browser could reach it: by a request across origins, or by a name
of its own that leads to 127.0.0.1 (DNS rebinding). A browser says where a request comes from; such are refused.
"""

from __future__ import annotations

import sys
from typing import Any
from urllib.parse import urlsplit

import flower.command
from flower.app import Flower
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.web import ErrorHandler

from perllm.broker import connection
from perllm.broker.celery import app
from perllm.broker.errors import PerLLMError, exit_with
from perllm.broker.settings import load_settings

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def from_here(method: str, headers: HTTPHeaders) -> bool:
    """Whether a request was addressed to this machine's loopback, and by no page from elsewhere (fetch.spec.whatwg.org,
    "Origin header"; w3c.github.io/webappsec-fetch-metadata). What is no browser says nothing of origins."""
    host, origin, site = headers.get("Host", ""), headers.get("Origin"), headers.get("Sec-Fetch-Site", "none")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    followed_link = method == "GET" and headers.get("Sec-Fetch-Dest") == "document"
    return (
        name in _LOOPBACK
        and origin in (None, f"http://{host}")
        and (site in ("none", "same-origin") or (followed_link and origin is None))
    )


class Guarded(Flower):  # type: ignore[misc]
    """Flower, for requests from here."""

    def find_handler(self, request: HTTPServerRequest, **options: Any) -> Any:
        assert request.method is not None
        if not from_here(request.method, request.headers):
            return self.get_handler_delegate(request, ErrorHandler, {"status_code": 403})
        return super().find_handler(request, **options)


def main() -> int:
    """Run it until interrupted. Status 2, and one line, for an unusable server."""
    try:
        connection.check(load_settings())
    except PerLLMError as error:
        exit_with(error)
    flower.command.Flower = Guarded
    app.start(["flower", *sys.argv[1:]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
