"""Where a step's time goes on one shard, and what it did to the weights, for people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from adashard.wire.control import StepSummary
from adashard.wire.messages import Outcome, Record
from adashard_server.optim.adafactor import Measures
from adashard_server.shard.records import CLEAN, Poison


@dataclass(slots=True)
class _Step:
    """The step at hand: moments in seconds of the clock, and sums over slices and workers."""

    number: int
    began: float
    pushed: float | None = None
    full: float | None = None
    committed: float | None = None
    record: Record | None = None
    poison: Poison = CLEAN
    apply_s: float = 0.0
    replies: int = 0
    pushed_bytes: int = 0
    pulled_bytes: int = 0
    gradient_squared_sum: float = 0.0
    update_squared_sum: float = 0.0
    element_count: int = 0
    clip_ratio: float = 1.0
    phase_s: dict[str, float] = field(default_factory=dict)


class Stopwatch:
    """Times the phases of steps; the engine's lock covers every call.

    Phases, in seconds, of the step's time on this shard:

    * *receive*: from the first gradient until the first worker's is whole,
    * *wait*: until those of all workers are,
    * *exchange*: until the reports of all shards are here,
    * *apply*: spent in updates,
    * *reply*: the rest, until the last worker has its weights.
    """

    def __init__(self, job: str, clock: Callable[[], float]) -> None:
        self._job = job
        self._clock = clock
        self._steps: dict[int, _Step] = {}

    def began(self, step: int) -> None:
        """A push has begun; a fast worker's may come before a slow one has its last reply."""
        if step not in self._steps:
            self._steps[step] = _Step(step, self._clock())
            for old in [number for number in self._steps if number < step - 1]:
                del self._steps[old]

    def received(self, step: int, size_bytes: int) -> None:
        """Elements of a gradient have come."""
        if (now := self._at(step)) is not None:
            now.pushed_bytes += size_bytes

    def pushed(self, step: int) -> None:
        """A worker's gradient is whole."""
        if (now := self._at(step)) is not None and now.pushed is None:
            now.pushed = self._clock()

    def reported(self, step: int) -> None:
        """The own round is full."""
        if (now := self._at(step)) is not None and now.full is None:
            now.full = self._clock()

    def committed(
        self, record: Record, squared_sum: float, poison: Poison = CLEAN
    ) -> StepSummary | None:
        """The step is decided.

        Args:
            record: of the step.
            squared_sum: of the mean gradient on this shard.
            poison: what of the step was not finite.

        Returns:
            The summary, if the replies of the step have overtaken this.
        """
        if (now := self._at(record.step)) is None:
            return None
        now.committed, now.record, now.poison = self._clock(), record, poison
        now.gradient_squared_sum = squared_sum
        return self._finished(now)

    def applied(self, step: int, measures: Measures | None, count: int, spent_s: float) -> None:
        """A slice of `count` elements has taken the step; `measures` is None where unchanged."""
        if (now := self._at(step)) is None:
            return
        now.apply_s += spent_s
        if measures is not None:
            now.update_squared_sum += measures.update_squared_sum
            now.element_count += count
            now.clip_ratio = max(now.clip_ratio, measures.clip_ratio)

    def sent(self, step: int, size_bytes: int) -> None:
        """Weights have been handed to the network."""
        if (now := self._at(step)) is not None:
            now.pulled_bytes += size_bytes

    def replied(self, step: int) -> StepSummary | None:
        """A reply is whole; the summary of the step if it was the last one."""
        if (now := self._at(step)) is None:
            return None
        now.replies += 1
        return self._finished(now)

    def _finished(self, step: _Step) -> StepSummary | None:
        if step.record is None or step.replies < len(step.record.workers):
            return None
        del self._steps[step.number]
        return self._summary(step, step.record)

    def _at(self, step: int) -> _Step | None:
        return self._steps.get(step)

    def _summary(self, step: _Step, record: Record) -> StepSummary:
        end = self._clock()
        committed = step.committed if step.committed is not None else end
        # Threads may note a moment after one that follows from it has been noted.
        full = committed if step.full is None else min(step.full, committed)
        pushed = full if step.pushed is None else min(step.pushed, full)
        first = record.groups[0]
        return StepSummary(
            job=self._job,
            step=record.step,
            phase_s={
                "receive": pushed - step.began,
                "wait": full - pushed,
                "exchange": committed - full,
                "apply": step.apply_s,
                "reply": max(0.0, end - committed - step.apply_s),
            },
            duration_s=end - step.began,
            gradient_squared_sum=step.gradient_squared_sum,
            update_squared_sum=step.update_squared_sum,
            element_count=step.element_count,
            clip_ratio=step.clip_ratio,
            lr_requested=first.adafactor.lr if first.adafactor else 0.0,
            lr_applied=max(first.schedules, key=lambda one: one.step_count).rho
            if first.schedules
            else 0.0,
            pushed_bytes=step.pushed_bytes,
            pulled_bytes=step.pulled_bytes,
            skipped=record.outcome is Outcome.SKIP,
            not_finite_workers=step.poison.workers,
            not_finite_parameters=step.poison.parameters,
        )
