"""Server-sent events: what has changed, told as it changes.

One stream carries three kinds of event:

* `status`, once a second: how the cluster, jobs, shards and workers stand.
* `step`, at most four times a second and job: steps that were added or changed since the last one.
  A reader that is slow gets fewer and larger ones, never a queue.
* `membership`: joins, leaves, generations. Only these have an id; a reader that comes back with
  `Last-Event-ID` gets those it missed, as far as the coordinator still has them.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import count

from fastapi.sse import ServerSentEvent

from adashard_server.http.schemas import (
    Cluster,
    Job,
    MembershipEvent,
    Shard,
    StatusUpdate,
    Step,
    StepUpdate,
    Worker,
    utc,
)
from adashard_server.http.sources import Sources

TICKS_PER_STATUS = 4
MEMBERS_MAX = 256
"""Jobs, shards and workers in one `status` event; the lists have all of them."""

POINTS_MAX = 200
"""Steps in one `step` event; more are thinned."""

RETRY_MS = 1000
"""What a browser waits before it comes back."""

_SEQUENCE = re.compile(r"[0-9]{1,18}")


async def watch(
    sources: Sources,
    *,
    job: str | None,
    after: int,
    tick: Callable[[], Awaitable[bool]],
) -> AsyncIterator[ServerSentEvent]:
    """Tell what changes, until `tick` answers False.

    Args:
        sources: what is watched.
        job: only this job's steps and workers, and its events beside those of the cluster; or None.
        after: sequence number of the last membership event that the reader has.
        tick: waits until the next look.
    """
    yield ServerSentEvent(retry=RETRY_MS, comment="adashard")
    watcher = _Watcher(sources, job, after)
    for number in count():
        for event in watcher.membership():
            yield event
        for event in watcher.steps():
            yield event
        if number % TICKS_PER_STATUS == 0:
            yield watcher.status()
        if not await tick():
            return


def resume_after(sources: Sources, last_event_id: str | None, after: int | None) -> int:
    """Sequence number after which a reader wants to hear membership events.

    Args:
        sources: whose events.
        last_event_id: the header that a browser sends when it comes back.
        after: the query parameter; 0 asks for all that are kept.

    Returns:
        The header's number if it is of this start of the coordinator, 0 if it is of an earlier one
        (then all are news); without a header `after`, and without both the newest number.
    """
    if last_event_id:
        epoch, _, sequence = last_event_id.rpartition("-")
        known = epoch == sources.streams.epoch and _SEQUENCE.fullmatch(sequence)
        return int(sequence) if known else 0
    if after is not None:
        return after
    return max((event.sequence for event in sources.view.events()), default=0)


class _Watcher:
    """What one reader has been told."""

    def __init__(self, sources: Sources, job: str | None, after: int) -> None:
        self._sources = sources
        self._job = job
        self._after = after
        history = sources.history
        self._told = {name: history.sequence(name) for name in history.jobs()}

    def membership(self) -> Iterator[ServerSentEvent]:
        for event in self._sources.view.events(after=self._after):
            self._after = max(self._after, event.sequence)
            if self._job is None or event.job in ("", self._job):
                yield ServerSentEvent(
                    event="membership",
                    id=f"{self._sources.streams.epoch}-{event.sequence}",
                    data=MembershipEvent.of(event),
                )

    def steps(self) -> Iterator[ServerSentEvent]:
        history = self._sources.history
        for job in history.jobs() if self._job is None else [self._job]:
            points = history.changed(job, self._told.get(job, 0), max_points=POINTS_MAX)
            self._told[job] = history.sequence(job)
            latest = history.latest(job)
            if points and latest is not None:
                update = StepUpdate(
                    job=job,
                    steps_per_second=history.steps_per_second(job, now_s=self._sources.clock()),
                    latest_step=latest.step,
                    items=[Step.of(point) for point in points],
                )
                yield ServerSentEvent(event="step", data=update)

    def status(self) -> ServerSentEvent:
        view = self._sources.view
        update = StatusUpdate(
            time=utc(self._sources.clock()),
            cluster=Cluster.of(view.cluster_statistics()),
            jobs=[Job.of(job) for job in view.job_statistics()[:MEMBERS_MAX]],
            shards=[Shard.of(shard) for shard in view.shard_statistics()[:MEMBERS_MAX]],
            workers=[Worker.of(one) for one in view.worker_statistics(self._job)[:MEMBERS_MAX]],
        )
        return ServerSentEvent(event="status", data=update)
