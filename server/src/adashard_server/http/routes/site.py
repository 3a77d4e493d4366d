"""The page, the API's documentation, and the files that both are made of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

DASHBOARD = Path(__file__).parent.parent / "dashboard"


def mount(app: FastAPI) -> None:
    """Serve `/`, `/docs` and `/static/`; none of them needs another host."""
    app.add_api_route("/", _file("index.html"), include_in_schema=False)
    app.add_api_route("/docs", _file("docs.html"), include_in_schema=False)
    app.mount("/static", _Files(directory=DASHBOARD), name="static")


def _file(name: str) -> Callable[[], Awaitable[FileResponse]]:
    async def read_file() -> FileResponse:
        return FileResponse(DASHBOARD / name, headers={"cache-control": "no-cache"})

    return read_file


class _Files(StaticFiles):
    """Files with an ETag; asked for again each time, save those with a version in their path."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        kept = path.startswith("vendor/") and response.status_code == 200
        response.headers["cache-control"] = (
            "public, max-age=31536000, immutable" if kept else "no-cache"
        )
        return response
