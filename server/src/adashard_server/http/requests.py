"""What every request passes through: an id, the headers of its answer, the last net for defects."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adashard_server.http.problems import defect
from adashard_server.telemetry.logs import errors

REQUEST_ID = "x-request-id"

_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# Nothing is loaded from elsewhere, no script or style stands in a page itself, nobody frames a
# page. Swagger UI draws its icons from data: URIs.
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class RequestContext:
    """Middleware that gives each request an id, and each answer the id and the security headers.

    A caller's own `x-request-id` is kept if it is short and plain. An exception that nothing inside
    has answered is logged with its traceback and answered as `Internal`, without it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        request_id = _request_id(request.headers.get(REQUEST_ID))
        request.state.request_id = request_id
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS | {REQUEST_ID: request_id})
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            path = request.url.path
            errors.exception("request_failed", extra={"request_id": request_id, "path": path})
            if not started:
                await defect(request)(scope, receive, send_with_headers)


def _request_id(given: str | None) -> str:
    return given if given and _ACCEPTED_ID.fullmatch(given) else uuid.uuid4().hex
