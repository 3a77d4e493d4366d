"""One step of a job as people look at it, merged from what its shards and workers said."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from adashard.wire.control import StepSummary

_NO_VALUES: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPoint:
    """A step that all shards have told about.

    Attributes:
        step: its number, from 1.
        time_s: when the last shard told, in seconds of the caller's clock.
        interval_s: seconds since the step before it was complete; None for the first.
        duration_s: seconds from the first frame to the last reply, on the slowest shard.
        phase_s: seconds by phase (receive, wait, exchange, apply, reply), each on the shard where
            it took longest; their sum may therefore exceed `duration_s`.
        gradient_norm: Euclidean norm of the mean gradient over all parameters.
        update_rms: root mean square of the update before the step size, over all elements.
        clip_ratio: largest factor by which an update was divided to clip it; 1 for none.
        lr_requested: learning rate as asked for, of the first group; 0 where none was.
        lr_applied: step size as applied, of the first group.
        pushed_bytes: gradients received, over all shards and workers.
        pulled_bytes: weights sent, over all shards and workers.
        skipped: whether the step left the weights alone.
        not_finite_workers: those that said that their gradients were not finite.
        not_finite_parameters: names of parameters whose gradients were not finite; some of them.
        values: means of what the workers logged for this step.
    """

    step: int
    time_s: float
    interval_s: float | None = None
    duration_s: float = 0.0
    phase_s: Mapping[str, float] = field(default_factory=dict)
    gradient_norm: float = 0.0
    update_rms: float = 0.0
    clip_ratio: float = 1.0
    lr_requested: float = 0.0
    lr_applied: float = 0.0
    pushed_bytes: int = 0
    pulled_bytes: int = 0
    skipped: bool = False
    not_finite_workers: tuple[str, ...] = ()
    not_finite_parameters: tuple[str, ...] = ()
    values: Mapping[str, float] = field(default_factory=lambda: _NO_VALUES)

    @property
    def loss(self) -> float | None:
        """Mean of the losses that the workers logged; None if none did."""
        return self.values.get("loss")


def merge(
    summaries: Collection[StepSummary],
    *,
    time_s: float,
    interval_s: float | None,
    values: Mapping[str, float],
) -> StepPoint:
    """Merge what the shards say about one step; their order does not matter.

    Durations and ratios are those of the slowest or most extreme shard, since a step ends when its
    last shard ends; bytes and sums of squares are added, since the shards hold disjoint parts.

    Args:
        summaries: of the same step, one per shard, at least one.
        time_s: when the last of them arrived.
        interval_s: seconds since the step before, if known.
        values: means of what the workers logged.
    """
    return StepPoint(
        step=next(iter(summaries)).step,
        time_s=time_s,
        interval_s=interval_s,
        duration_s=max(summary.duration_s for summary in summaries),
        phase_s=_longest_phases(summaries),
        gradient_norm=_root(math.fsum(s.gradient_squared_sum for s in summaries)),
        update_rms=_update_rms(summaries),
        clip_ratio=max(summary.clip_ratio for summary in summaries),
        lr_requested=max(summary.lr_requested for summary in summaries),
        lr_applied=max(summary.lr_applied for summary in summaries),
        pushed_bytes=sum(summary.pushed_bytes for summary in summaries),
        pulled_bytes=sum(summary.pulled_bytes for summary in summaries),
        skipped=any(summary.skipped for summary in summaries),
        not_finite_workers=_union(summary.not_finite_workers for summary in summaries),
        not_finite_parameters=_union(summary.not_finite_parameters for summary in summaries),
        values=dict(values),
    )


def thin(points: Sequence[StepPoint], max_points: int) -> list[StepPoint]:
    """Choose at most `max_points` of `points`, so that a chart of them looks the same.

    The first point stays; the others fall into buckets of equal count, and each bucket keeps the
    step with the largest gradient norm and its last step. All that is answered has happened (no
    averages of steps), and a spike of a single step is not lost.

    Args:
        points: in order of their steps.
        max_points: at least 1.
    """
    if len(points) <= max_points:
        return list(points)
    if max_points < 3:
        return [points[0], points[-1]][-max_points:]
    bucket_count = (max_points - 1) // 2
    rest = len(points) - 1
    kept = [points[0]]
    for bucket in range(bucket_count):
        begin = 1 + rest * bucket // bucket_count
        end = 1 + rest * (bucket + 1) // bucket_count
        peak = max(range(begin, end), key=lambda index: _height(points[index]))
        kept.extend(points[index] for index in sorted({peak, end - 1}))
    return kept


def _union(lists: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(sorted({name for names in lists for name in names}))


def _longest_phases(summaries: Collection[StepSummary]) -> dict[str, float]:
    longest: dict[str, float] = {}
    for summary in summaries:
        for phase, seconds in summary.phase_s.items():
            longest[phase] = max(seconds, longest.get(phase, 0.0))
    return longest


def _update_rms(summaries: Collection[StepSummary]) -> float:
    elements = sum(summary.element_count for summary in summaries)
    if elements == 0:
        return 0.0
    return _root(math.fsum(summary.update_squared_sum for summary in summaries) / elements)


def _root(square: float) -> float:
    # A shard that met a gradient which is not finite says so with a sum that is not finite.
    return math.sqrt(square) if square >= 0.0 else math.nan


def _height(point: StepPoint) -> float:
    return math.inf if math.isnan(point.gradient_norm) else point.gradient_norm
