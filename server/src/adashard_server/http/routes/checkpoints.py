"""Checkpoints: one is made now. The only route that changes anything, so it asks for the token."""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import APIRouter, Depends, Header

from adashard.wire.errors import Unauthenticated
from adashard_server.http.paths import KnownJob
from adashard_server.http.schemas import CreatedCheckpoint
from adashard_server.http.sources import From

router = APIRouter(prefix="/api/v1/jobs", tags=["jobs"])


async def authorized(
    sources: From, authorization: Annotated[str, Header(description="`Bearer TOKEN`.")] = ""
) -> None:
    """Lets those pass who know the cluster's token; all, where it has none.

    Raises:
        Unauthenticated: no token, or a wrong one.
    """
    expected = f"Bearer {sources.token}"
    if sources.token and not hmac.compare_digest(authorization.encode(), expected.encode()):
        raise Unauthenticated("This request needs the header 'Authorization: Bearer TOKEN'.")


@router.post(
    "/{job}/checkpoints",
    summary="Make a checkpoint now",
    status_code=201,
    dependencies=[Depends(authorized)],
)
async def create_checkpoint(job: KnownJob, sources: From) -> CreatedCheckpoint:
    """Cuts a checkpoint of the job as it is, and answers when it is on disk.

    Steps go on meanwhile. The checkpoint is kept until somebody removes it.
    """
    facts = await sources.create_checkpoint(job.name)
    return CreatedCheckpoint(
        name=facts["checkpoint"],
        version=int(facts["version"]),
        size_bytes=int(facts["bytes"]),
        stall_s=float(facts["stall_s"]),
    )
