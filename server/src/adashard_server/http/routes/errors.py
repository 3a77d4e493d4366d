"""The catalogue of errors, where the `type` of a problem document leads to."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.exceptions import HTTPException

from adashard.wire.errors import AdashardError, catalogue
from adashard_server.http.problems import title_of
from adashard_server.http.schemas import ErrorDescription

router = APIRouter(prefix="/api/v1/errors", tags=["operation"])


@router.get("/{code}", summary="What an error means")
async def read_error(code: str) -> ErrorDescription:
    """What an error of the catalogue means, and what to do about it."""
    kind = catalogue().get(code)
    if kind is None or kind is AdashardError:
        raise HTTPException(404, f"There is no error {code!r}.")
    return ErrorDescription(
        code=code, status=kind.http_status, title=title_of(kind), hint=kind.default_remedy
    )
