"""Jobs: where they stand, what their state weighs, and the steps they have taken."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from adashard.wire.errors import InvalidRequest
from adashard_server.http.pagination import Cursor, Limit, clamp, page
from adashard_server.http.paths import KnownJob
from adashard_server.http.schemas import Job, JobDetail, Listing, State, Step
from adashard_server.http.sources import From

router = APIRouter(prefix="/api/v1/jobs", tags=["jobs"])

POINTS_MAX = 2000
"""Steps in one answer at most; a larger `max_points` is lowered to this."""


@router.get("", summary="All jobs")
async def list_jobs(sources: From, limit: Limit = 100, cursor: Cursor = None) -> Listing[Job]:
    """Jobs by name."""
    jobs, next_cursor = page(
        sources.view.job_statistics(), lambda job: (job.name,), limit=limit, cursor=cursor
    )
    return Listing(items=[Job.of(job) for job in jobs], next_cursor=next_cursor)


@router.get("/{job}", summary="One job")
async def read_job(job: KnownJob, sources: From) -> JobDetail:
    """Where a job stands, with its rate and its newest step."""
    latest = sources.history.latest(job.name)
    return JobDetail.of_history(
        job,
        steps_per_second=sources.history.steps_per_second(job.name, now_s=sources.clock()),
        latest=latest,
    )


@router.get("/{job}/state", summary="Size of the optimizer state")
async def read_state(job: KnownJob) -> State:
    """Bytes of optimizer state, by shard and by kind, beside what Adam would hold."""
    return State.of(job)


@router.get("/{job}/steps", summary="History of steps")
async def list_steps(
    job: KnownJob,
    sources: From,
    first: Annotated[int | None, Query(alias="from", description="First step.")] = None,
    last: Annotated[int | None, Query(alias="to", description="Last step.")] = None,
    max_points: Annotated[
        int, Query(description=f"Steps to answer, from 1 to {POINTS_MAX}; clamped, not refused.")
    ] = 500,
) -> Listing[Step]:
    """Steps by number, in one page: durations by phase, norms, learning rates, bytes, loss.

    The newest 1024 steps are kept exactly, those before more and more thinly. Where more than
    `max_points` lie in the range, the first one stays, and every bucket of the others keeps the
    step with the largest gradient norm and its last step.
    """
    if first is not None and last is not None and first > last:
        raise InvalidRequest(
            f"from={first} lies after to={last}.", remedy="Swap them, or leave one of them out."
        )
    points = sources.history.steps(
        job.name, first=first, last=last, max_points=clamp(max_points, 1, POINTS_MAX)
    )
    return Listing(items=[Step.of(point) for point in points], next_cursor=None)
