"""Event streams, for pages and for `curl -N`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent

from adashard_server.http.events import resume_after, watch
from adashard_server.http.paths import KnownJob
from adashard_server.http.sources import From


async def place(sources: From) -> AsyncIterator[None]:
    """Holds a place for a stream, or refuses it before it begins."""
    with sources.streams.slot():
        yield


router = APIRouter(prefix="/api/v1", tags=["events"], dependencies=[Depends(place)])


async def starting_point(
    sources: From,
    after: Annotated[
        int | None,
        Query(description="Membership events after this number first; 0 for all that are kept."),
    ] = None,
    last_event_id: Annotated[
        str | None, Header(description="Id of the last event that was read; wins over `after`.")
    ] = None,
) -> int:
    """Number of the last membership event that the reader has."""
    return resume_after(sources, last_event_id, after)


After = Annotated[int, Depends(starting_point)]


@router.get("/events", response_class=EventSourceResponse, summary="What changes")
async def stream_events(
    sources: From,
    after: After,
    job: Annotated[
        str | None,
        Query(description="Only steps and workers of this job, which need not exist yet."),
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """`status` once a second, `step` up to four times a second and job, `membership` at once."""
    async for event in watch(sources, job=job, after=after, tick=sources.streams.tick):
        yield event


@router.get(
    "/jobs/{job}/events", response_class=EventSourceResponse, summary="What changes in a job"
)
async def stream_job_events(
    sources: From, job: KnownJob, after: After
) -> AsyncIterator[ServerSentEvent]:
    """The same for one job; 404 if there is none of that name."""
    async for event in watch(sources, job=job.name, after=after, tick=sources.streams.tick):
        yield event
