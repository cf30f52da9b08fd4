"""Pages for people: `/` says what this is, `/docs` and `/redoc` show the OpenAPI document.

Swagger UI (Apache-2.0) and ReDoc (MIT) are the files of the package fastapi-offline (MIT): nothing is fetched from
elsewhere, and no script runs but these files, as the pages' content security policy says.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from perllm.broker.api.errors import not_found

router = APIRouter(include_in_schema=False)

_KINDS = {"js": "text/javascript", "css": "text/css", "png": "image/png"}
_ASSETS = ("favicon.png", "redoc.standalone.js", "swagger-ui-bundle.js", "swagger-ui.css")
#: Both libraries style their elements as they make them. ReDoc searches in a worker made of its own script.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>PerLLM</title>
<link rel="icon" href="pages/favicon.png">
{head}
</head>
<body>
{body}
</body>
</html>
"""
_SWAGGER = _PAGE.format(
    head='<link rel="stylesheet" href="pages/swagger-ui.css">',
    body='<div id="swagger-ui"></div>\n'
    '<script src="pages/swagger-ui-bundle.js"></script>\n<script src="pages/swagger.js"></script>',
)
_REDOC = _PAGE.format(
    head="", body='<redoc spec-url="openapi.json"></redoc>\n<script src="pages/redoc.standalone.js"></script>'
)
_SWAGGER_SCRIPT = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true});\n'


@router.get("/")
async def about() -> Response:
    """What this is. Needs no key."""
    return JSONResponse(
        {
            "object": "api",
            "name": "PerLLM",
            "version": version("perllm"),
            "description": "An OpenAI-compatible API over a queue for LLM work with deadlines.",
            "base_url": "/v1",
            "docs": ["/docs", "/redoc"],
            "openapi": "/openapi.json",
            "health": ["/health", "/ready"],
        }
    )


@router.get("/docs")
async def swagger() -> Response:
    """The OpenAPI document, to try out. Needs no key."""
    return _page(_SWAGGER)


@router.get("/redoc")
async def redoc() -> Response:
    """The OpenAPI document, to read. Needs no key."""
    return _page(_REDOC)


@router.get("/pages/{name}")
async def asset(name: str) -> Response:
    """A file of these pages. Needs no key."""
    if name == "swagger.js":
        return _file(_SWAGGER_SCRIPT.encode(), "js")
    if name not in _ASSETS:
        raise not_found("file", name)
    return _file(_content(name), name.rpartition(".")[2])


@cache
def _content(name: str) -> bytes:
    return (files("fastapi_offline") / "static" / name).read_bytes()


def _page(text: str) -> Response:
    return _response(text.encode(), "text/html", {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"})


def _file(content: bytes, kind: str) -> Response:
    return _response(content, _KINDS[kind], {"Cache-Control": "public, max-age=3600"})


def _response(content: bytes, kind: str, headers: dict[str, Any]) -> Response:
    return Response(content, media_type=kind, headers={"X-Content-Type-Options": "nosniff", **headers})
