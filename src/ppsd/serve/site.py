"""The pages for people: files of this package, which need nothing else and no key."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ppsd.serve.openapi import document

HERE = Path(__file__).with_name("pages")


def site() -> list[Route]:
    """Return the routes of the live page, and of the description of all paths."""
    description = document()

    async def openapi(request: Request) -> Response:
        return JSONResponse(description)

    return [_page("/", "live.html"), _page("/docs", "docs.html"), Route("/openapi.json", openapi)]


def _page(path: str, name: str) -> Route:
    """Return the route of a file, which may run its own script and reach this server alone."""
    text = (HERE / name).read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(text, 'script')}; "
        f"style-src {_hash(text, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }

    async def page(request: Request) -> Response:
        return Response(text, media_type="text/html", headers=headers)

    return Route(path, page)


def _hash(text: str, element: str) -> str:
    """Return the hash by which a policy allows the page's one element of a kind."""
    [content] = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"
