"""The steps that jobs have taken, kept in bounded memory: what the page and REST draw from.

Of every job the newest `RECENT_MAX` steps are kept exactly. A step that falls out of these joins
the older ones, of which every `stride`-th is kept; when they are `OLDER_MAX`, every second is
dropped and the stride doubles. So a run of any length is shown from its first step, in about 2 MiB.

Nothing here reads a clock, and nothing is thread-safe: the coordinator's event loop owns it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, takewhile

from adashard.wire.control import Logged, StepSummary
from adashard_server.telemetry.points import StepPoint, merge, thin

JOBS_MAX = 64
"""Jobs that are remembered; beyond it the job that changed longest ago is forgotten."""

RECENT_MAX = 1024
"""Steps of a job that are kept exactly."""

OLDER_MAX = 1024
"""Steps of a job that are kept of those before."""

PENDING_MAX = 64
"""Steps of a job that may wait for a summary; beyond it the one that waits longest is dropped."""

VALUES_MAX = 16
"""Different names that workers may log for one step; further ones are dropped."""

RATE_WINDOW_S = 30.0
"""Seconds of the past that the rate of steps is taken over."""


class History:
    """The steps of all jobs."""

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}
        self._sequence = 0

    def add(
        self, shard: str, summary: StepSummary, *, shard_count: int, now_s: float
    ) -> StepPoint | None:
        """Take in what one shard says about a step.

        A step is shown once all shards have told about it; one whose summaries are lost on the way
        is a gap. If a job has gone back (a step that is told again by all), what came after is cut.

        Args:
            shard: id of the shard that tells.
            summary: what it tells; a second one from the same shard replaces the first.
            shard_count: shards that hold the job at this moment.
            now_s: the time, in seconds.

        Returns:
            The step, if it is complete with this summary.
        """
        series = self._of(summary.job)
        gathered = series.pending(summary.step)
        gathered.summaries[shard] = summary
        if len(gathered.summaries) < shard_count:
            return None
        entry = series.complete(summary.step, now_s=now_s)
        self._touch(series, entry)
        return entry.point

    def log(self, logged: Logged) -> None:
        """Take in values that a worker reports for a step, before or after its shards do.

        The same name reported several times for a step (by its workers) counts with its mean.
        """
        series = self._of(logged.job)
        newest = series.newest
        if newest is None or logged.step > newest.point.step:
            series.pending(logged.step).reports.add(logged)
            return
        entry = series.find(logged.step)
        if entry is not None:
            entry.reports.add(logged)
            entry.point = replace(entry.point, values=entry.reports.means())
            self._touch(series, entry)

    def steps(
        self,
        job: str,
        *,
        first: int | None = None,
        last: int | None = None,
        max_points: int = 500,
    ) -> list[StepPoint]:
        """Steps of a job from `first` to `last`, both included, oldest first.

        More than `max_points` are thinned as `points.thin` says; an unknown job has none.
        """
        points = [
            entry.point
            for entry in self._entries(job)
            if (first is None or entry.point.step >= first)
            and (last is None or entry.point.step <= last)
        ]
        return thin(points, max_points)

    def changed(self, job: str, since: int, *, max_points: int = 500) -> list[StepPoint]:
        """Steps that were added or changed after the sequence number `since`, oldest first.

        Args:
            job: name of the job.
            since: an earlier answer of `sequence`; 0 for all.
            max_points: more are thinned as `points.thin` says.
        """
        if since >= self.sequence(job):
            return []
        return thin([e.point for e in self._entries(job) if e.changed > since], max_points)

    def latest(self, job: str) -> StepPoint | None:
        """The newest step of a job, if there is one."""
        series = self._series.get(job)
        return series.newest.point if series is not None and series.newest is not None else None

    def steps_per_second(self, job: str, *, now_s: float) -> float:
        """Rate at which a job completes steps, over the last `RATE_WINDOW_S`; 0 when unknown.

        Time without a step counts once it is longer than three usual intervals: a job that halts
        slows down to 0 instead of keeping its last rate.
        """
        series = self._series.get(job)
        times = series.times_since(now_s - RATE_WINDOW_S) if series is not None else []
        if len(times) < 2 or times[-1] <= times[0]:
            return 0.0
        span = times[-1] - times[0]
        idle = now_s - times[-1]
        intervals = len(times) - 1
        return intervals / (span + idle if idle > 3 * span / intervals else span)

    def sequence(self, job: str) -> int:
        """A number that grows with every change of the job's steps; 0 for an unknown job."""
        series = self._series.get(job)
        return series.changed if series is not None else 0

    def jobs(self) -> list[str]:
        """Names of the jobs that are remembered, by name."""
        return sorted(self._series)

    def forget(self, job: str) -> None:
        """Drop all steps of a job; idempotent."""
        self._series.pop(job, None)

    def _of(self, job: str) -> _Series:
        series = self._series.get(job)
        if series is None:
            if len(self._series) >= JOBS_MAX:
                self.forget(min(self._series, key=self.sequence))
            series = self._series[job] = _Series()
        return series

    def _entries(self, job: str) -> Iterator[_Entry]:
        series = self._series.get(job)
        return iter(()) if series is None else chain(series.older, series.recent)

    def _touch(self, series: _Series, entry: _Entry) -> None:
        # One counter for all jobs: a job that is forgotten and comes back never counts backwards.
        self._sequence += 1
        series.changed = entry.changed = self._sequence


@dataclass(slots=True)
class _Reports:
    """Sums and counts of the values that workers logged for one step."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, logged: Logged) -> None:
        for name, value in logged.values.items():
            if name not in self.sums and len(self.sums) >= VALUES_MAX:
                continue
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}


@dataclass(slots=True)
class _Gathered:
    """What is known of a step that not all shards have told about."""

    summaries: dict[str, StepSummary] = field(default_factory=dict)
    reports: _Reports = field(default_factory=_Reports)


@dataclass(slots=True)
class _Entry:
    """A complete step, and when it last changed."""

    point: StepPoint
    reports: _Reports
    changed: int = 0


class _Series:
    """The steps of one job, by number: `older` thinned, then `recent` exact."""

    def __init__(self) -> None:
        self.recent: deque[_Entry] = deque()
        self.older: list[_Entry] = []
        self.changed = 0
        self._stride = 1
        self._aged = 0
        self._pending: dict[int, _Gathered] = {}

    @property
    def newest(self) -> _Entry | None:
        kept = self.recent or self.older
        return kept[-1] if kept else None

    def pending(self, step: int) -> _Gathered:
        gathered = self._pending.get(step)
        if gathered is None:
            if len(self._pending) >= PENDING_MAX:
                del self._pending[next(iter(self._pending))]
            gathered = self._pending[step] = _Gathered()
        return gathered

    def complete(self, step: int, *, now_s: float) -> _Entry:
        gathered = self._pending.pop(step)
        self._cut(step)
        before = self.newest
        point = merge(
            gathered.summaries.values(),
            time_s=now_s,
            interval_s=max(0.0, now_s - before.point.time_s) if before is not None else None,
            values=gathered.reports.means(),
        )
        entry = _Entry(point, gathered.reports)
        self.recent.append(entry)
        if len(self.recent) > RECENT_MAX:
            self._age(self.recent.popleft())
        return entry

    def find(self, step: int) -> _Entry | None:
        for entry in chain(reversed(self.recent), reversed(self.older)):
            if entry.point.step <= step:
                return entry if entry.point.step == step else None
        return None

    def times_since(self, time_s: float) -> list[float]:
        newest_first = (entry.point.time_s for entry in reversed(self.recent))
        return list(takewhile(lambda time: time >= time_s, newest_first))[::-1]

    def _cut(self, step: int) -> None:
        while self.recent and self.recent[-1].point.step >= step:
            self.recent.pop()
        while self.older and self.older[-1].point.step >= step:
            self.older.pop()

    def _age(self, entry: _Entry) -> None:
        if self._aged % self._stride == 0:
            self.older.append(entry)
        self._aged += 1
        if len(self.older) > OLDER_MAX:
            self.older = self.older[::2]
            self._stride *= 2
