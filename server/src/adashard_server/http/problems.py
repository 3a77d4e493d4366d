"""Errors as problem documents (RFC 9457): what a caller gets, and how OpenAPI describes it.

Every error has the same shape and media type, whoever raised it: the catalogue of
`adashard.wire.errors`, the router (no such path), validation of parameters, or a defect. A defect
is logged with its traceback and answered without it.

References:
    M. Nottingham, E. Wilde, S. Dalal: Problem Details for HTTP APIs, RFC 9457, 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from adashard.wire.errors import AdashardError, Internal, InvalidRequest

MEDIA_TYPE = "application/problem+json"


class InvalidParameter(BaseModel):
    """One parameter of a request that cannot be right."""

    location: str = Field(description="Where it stands, for example `query.max_points`.")
    message: str = Field(description="What is wrong with it.")


class Problem(BaseModel):
    """An error, as RFC 9457 describes it, with a stable code and what to do about it."""

    model_config = ConfigDict(frozen=True)

    type: str = Field(
        description="Reference to a description; about:blank where the title says all."
    )
    title: str = Field(description="What kind of error it is; the same for all of its code.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What happened here.")
    instance: str = Field(description="Path that was asked for.")
    code: str = Field(description="Stable name of the error, for programs.")
    hint: str = Field(description="What to do about it; may be empty.")
    request_id: str = Field(description="The same as in the header x-request-id, and in the log.")
    facts: dict[str, str] = Field(
        default_factory=dict, description="The detail's facts, as fields."
    )
    errors: list[InvalidParameter] = Field(
        default_factory=list, description="The parameters that are wrong, if any are."
    )


def install(app: FastAPI) -> None:
    """Answer all errors of `app` as problem documents, and say so in its OpenAPI document."""
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _invalid_parameters)
    app.add_exception_handler(AdashardError, _catalogue_error)
    _describe(app)


def defect(request: Request) -> JSONResponse:
    """The answer to an exception that nobody expected; the caller logs it."""
    return _answer(request, **_of_error(Internal("The server met a defect of its own.")))


def description_of(code: str) -> str:
    """Path under which this server describes an error of the catalogue."""
    return f"/api/v1/errors/{code}"


def title_of(kind: type[AdashardError]) -> str:
    """First sentence of the class's docstring."""
    return (kind.__doc__ or kind.__name__).strip().splitlines()[0].rstrip(".")


def _of_error(error: AdashardError) -> dict[str, Any]:
    return {
        "type": description_of(error.reason),
        "title": title_of(type(error)),
        "status": error.http_status,
        "detail": error.message,
        "code": error.reason,
        "hint": error.remedy,
        "facts": error.facts,
    }


def _answer(
    request: Request,
    *,
    headers: Mapping[str, str] | None = None,
    **fields: Any,  # noqa: ANN401 - pydantic checks them
) -> JSONResponse:
    problem = Problem(
        instance=request.scope.get("raw_path", b"").decode("latin-1") or request.url.path,
        request_id=request.scope.get("state", {}).get("request_id", ""),
        **fields,
    )
    return JSONResponse(
        problem.model_dump(exclude_defaults=True),
        status_code=problem.status,
        headers=dict(headers or {}),
        media_type=MEDIA_TYPE,
    )


async def _catalogue_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AdashardError)
    return _answer(request, **_of_error(error))


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    hint = (
        "GET /openapi.json lists the paths; /docs shows them." if error.status_code == 404 else ""
    )
    return _answer(
        request,
        headers=error.headers,
        type="about:blank",
        title=phrase,
        status=error.status_code,
        detail=str(error.detail),
        code=phrase.replace(" ", ""),
        hint=hint,
    )


async def _invalid_parameters(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    wrong = [
        InvalidParameter(location=".".join(map(str, one["loc"])), message=one["msg"])
        for one in error.errors()
    ]
    names = ", ".join(one.location for one in wrong)
    return _answer(request, **_of_error(InvalidRequest(f"Cannot be right: {names}.")), errors=wrong)


def _describe(app: FastAPI) -> None:
    # FastAPI would promise its own 422; every operation gets the problem document instead.
    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _with_problems(
                get_openapi(
                    title=app.title,
                    version=app.version,
                    description=app.description,
                    routes=app.routes,
                    tags=app.openapi_tags,
                )
            )
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _with_problems(document: dict[str, Any]) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas["Problem"] = schema
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    components["responses"] = {
        "Problem": {
            "description": "An error, as a problem document (RFC 9457).",
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    }
    for path in document.get("paths", {}).values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = {"$ref": "#/components/responses/Problem"}
    return document
