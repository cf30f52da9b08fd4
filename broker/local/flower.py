"""`python -m perllm.broker.local.flower`: Flower, as `perllm up` starts it, which no other web page can use.

Its page of queues shows every node's, and what is pending in the ledger as one more. It reaches the server as all of
ours do: Flower's own way knows no certificates in URLs, and no user's name on a socket.

Whoever reaches Flower may stop workers and revoke tasks through it. `perllm up` has it on loopback and asks for no
password, so a page from elsewhere in the developer's browser could reach it: by a request across origins, or by a name
of its own that leads to 127.0.0.1 (DNS rebinding). A browser says where a request comes from; such are refused.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from perllm.broker import connection, extras, logs
from perllm.broker.errors import PerLLMError, exit_with
from perllm.broker.ledger import Ledger
from perllm.broker.messages import State
from perllm.broker.settings import load_settings

try:
    import flower.command
    from flower.app import Flower
    from flower.views import BaseHandler
    from tornado.httputil import HTTPHeaders, HTTPServerRequest
    from tornado.web import ErrorHandler

    from perllm.broker.celery import app
    from perllm.broker.queues.app import INBOX, queue_lengths
except ModuleNotFoundError as error:
    exit_with(extras.lacking("Flower", error, "server"))

#: What the tasks are called there that wait in the ledger for a node.
PENDING = "pending (ledger)"
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


class Queues:
    """What Flower asks for its page of queues."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Those its workers say they consume, the inbox and every live node's, and the ledger's pending tasks."""
        return await asyncio.get_running_loop().run_in_executor(None, self._look, set(names))

    def _look(self, names: set[str]) -> list[dict[str, Any]]:
        names |= {INBOX, *(info.queue for info, _, _ in self._ledger.nodes())}
        lengths = queue_lengths(self._ledger.settings, sorted(names))
        lengths[PENDING] = self._ledger.counts()[State.PENDING]
        return [{"name": name, "messages": length} for name, length in lengths.items()]


def main() -> int:
    """Run it until interrupted. Status 2, and one line, for an unusable server."""
    try:
        settings = load_settings()
        logs.configure(settings)
        connection.check(settings)
        queues = Queues(Ledger(settings, reply_timeout=connection.NEAR_REPLY_TIMEOUT))
    except PerLLMError as error:
        exit_with(error)
    BaseHandler.get_broker = lambda _: queues
    flower.command.Flower = Guarded
    app.start(["flower", *sys.argv[1:]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
