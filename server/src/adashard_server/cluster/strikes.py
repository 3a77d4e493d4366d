"""Workers whose gradients are not finite, step after step: told of once, then put out. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from adashard.wire.control import StepSummary
from adashard.wire.errors import Evicted
from adashard_server.cluster.instructions import Announce

STRIKES = 3
"""Steps in a row after which a worker is evicted, where the cluster does not say."""

UNKNOWN = ""
"""Stands for the worker where a shard has found a sum that is not finite, and no worker said so."""


@dataclass(slots=True)
class _Streak:
    """Steps in a row: the newest of them, and how many."""

    step: int
    length: int


@dataclass(slots=True)
class _Streaks:
    """The streaks of one job, by worker, in one lineage: steps of another have other numbers."""

    lineage: int
    by_worker: dict[str, _Streak] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step's gradients lead to.

    Attributes:
        told: events for people; one for the first step of a streak.
        out: workers that are to be evicted, and what they are told.
    """

    told: tuple[Announce, ...] = ()
    out: Mapping[str, Evicted] = field(default_factory=dict)


class Strikes:
    """Counts, for each worker, the steps in a row that its gradients were not finite.

    Args:
        limit: steps in a row after which a worker is out; 0 for never.
    """

    def __init__(self, limit: int = STRIKES) -> None:
        self._limit = limit
        self._jobs: dict[str, _Streaks] = {}

    def take(self, summary: StepSummary, lineage: int) -> Verdict:
        """What one shard says of a step.

        All shards tell of a step: it counts when it is first told of, and one that comes after a
        later one of the same worker does not count at all.

        Args:
            summary: of the shard.
            lineage: number of the job's lineage.
        """
        named = summary.not_finite_workers
        if not named and summary.not_finite_parameters:
            named = (UNKNOWN,)
        if not named:
            return Verdict()
        streaks = self._of(summary.job, lineage)
        _forget_broken(streaks, summary.step)
        struck = {worker: _extend(streaks, worker, summary.step) for worker in named}
        new = [worker for worker, length in struck.items() if length == 1]
        out = [
            worker
            for worker, length in struck.items()
            if worker != UNKNOWN and length is not None and 0 < self._limit <= length
        ]
        return Verdict(
            told=(_event(summary, new),) if new else (),
            out={worker: _eviction(summary, worker, self._limit) for worker in out},
        )

    def _of(self, job: str, lineage: int) -> dict[str, _Streak]:
        known = self._jobs.get(job)
        if known is None or known.lineage != lineage:
            known = self._jobs[job] = _Streaks(lineage)
        return known.by_worker


def _extend(streaks: dict[str, _Streak], worker: str, step: int) -> int | None:
    """How many steps in a row it has been with this one; None where it counts already."""
    streak = streaks.setdefault(worker, _Streak(step - 1, 0))
    if step <= streak.step:
        return None
    streak.step, streak.length = step, streak.length + 1
    return streak.length


def _forget_broken(streaks: dict[str, _Streak], step: int) -> None:
    """Forgets those whose newest step is not the one before: they begin anew, if at all."""
    for worker in [worker for worker, one in streaks.items() if one.step < step - 1]:
        del streaks[worker]


def _event(summary: StepSummary, workers: Sequence[str]) -> Announce:
    whose = ", ".join(workers)
    of = f"the gradients of worker {whose}" if whose else "the sum of all workers"
    parameters = ", ".join(map(repr, summary.not_finite_parameters))
    return Announce(
        summary.job,
        "not_finite",
        f"step {summary.step} is skipped: NaN or Inf in {of}, at {parameters}",
        {"step": str(summary.step), "workers": whose, "parameters": parameters},
    )


def _eviction(summary: StepSummary, worker: str, limit: int) -> Evicted:
    parameters = ", ".join(map(repr, summary.not_finite_parameters))
    return Evicted(
        f"NaN or Inf in the gradients of {limit} steps of job {summary.job!r} in a row, the last "
        f"of them step {summary.step}, at {parameters} (worker {worker})",
        remedy="Look at what this worker computes: its data, its loss, its learning rate. step() "
        "joins anew, as a new worker; the server's --strikes sets after how many steps.",
        worker=worker,
        step=summary.step,
        parameters=parameters,
    )
