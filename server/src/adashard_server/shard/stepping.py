"""A record, or its draft, in the words of the mathematics: what slices need to step by it."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from adashard.wire.messages import AdafactorStep, Record
from adashard.wire.placement import Slice
from adashard.wire.spec import AdafactorLayout, EpsPlacement, JobSpec, WeightDecayMode
from adashard_server.optim.adafactor import Settings, State
from adashard_server.optim.layout import Layout
from adashard_server.optim.partials import Partial
from adashard_server.optim.passes import Passes
from adashard_server.optim.split import Measured, Short, SliceStep
from adashard_server.shard.partials import added, unpacked

_DECAY_MODES: dict[WeightDecayMode, Literal["alpha", "lr", "plain"]] = {
    WeightDecayMode.ALPHA: "alpha",
    WeightDecayMode.LR: "lr",
    WeightDecayMode.PLAIN: "plain",
}

_MEASURED_BY = ("step", "workers", "shares", "step_counts", "groups", "norm_factor")


class Stepping:
    """One record for all slices of a shard. Threads may share it: what it works out is fixed.

    Args:
        spec: the job.
        record: of the step, or its draft.
        passes: the loops.
    """

    def __init__(self, spec: JobSpec, record: Record, passes: type[Passes]) -> None:
        self.record = record
        self._spec, self._passes = spec, passes
        self._compared: tuple[Stepping, bool] | None = None
        self._shorts: dict[int, Short] = {}
        self.scale = record.norm_factor / added(record.shares)
        """What makes a sum over workers the mean, bounded in norm."""
        self._settings = [
            _settings(step.adafactor, group.adafactor)
            for step, group in zip(record.groups, spec.groups, strict=True)
            if step.adafactor is not None and group.adafactor is not None
        ]
        self._schedules = [
            {schedule.step_count: schedule for schedule in step.schedules} for step in record.groups
        ]

    def of(self, piece: Slice, layout: Layout) -> SliceStep:
        """The step of one slice."""
        group, count = self._group_and_count(piece)
        return SliceStep(
            layout,
            self._settings[group],
            beta2=self._schedules[group][count].beta2,
            scale=self.scale,
            passes=self._passes,
        )

    def rho(self, piece: Slice) -> float:
        """Relative step size, or learning rate, of the slice's parameter."""
        group, count = self._group_and_count(piece)
        return self._schedules[group][count].rho

    def total(self, piece: Slice, measured: Measured) -> Partial:
        """The sums over the slice's whole parameter; its own where that is not split."""
        return self._totals[piece.first] if piece.split else measured.partial

    def short(
        self, piece: Slice, step: SliceStep, state: State, measured: Measured
    ) -> Short | None:
        """The short factor after the step, worked out once for all slices of a parameter.

        Args:
            piece: a slice that has not taken the step.
            step: its step, by `of`.
            state: its own.
            measured: what it has found.
        """
        if step.layout.long is None:
            return measured.short
        short = self._shorts.get(piece.first)
        if short is None:
            short = self._shorts[piece.first] = step.short(state, self.total(piece, measured))
        return short

    def measures_as(self, other: Stepping) -> bool:
        """Whether slices measure the same by both: they differ in what exchanges add alone."""
        if self._compared is None or self._compared[0] is not other:  # asked for every slice
            ours, theirs = self.record, other.record
            same = all(getattr(ours, name) == getattr(theirs, name) for name in _MEASURED_BY)
            self._compared = other, same
        return self._compared[1]

    @cached_property
    def _totals(self) -> dict[int, Partial]:
        return {partial.slice: unpacked(partial) for partial in self.record.partials}

    def _group_and_count(self, piece: Slice) -> tuple[int, int]:
        group = self._spec.parameters[piece.parameter].group
        return group, self.record.step_counts[piece.parameter]


def _settings(step: AdafactorStep, layout: AdafactorLayout) -> Settings:
    """The step's hyper-parameters in the words of the mathematics."""
    return Settings(
        eps1=step.eps1,
        eps2=step.eps2,
        clip_threshold=step.clip_threshold,
        beta1=step.beta1 if layout.momentum else None,
        weight_decay=step.weight_decay,
        weight_decay_mode=_DECAY_MODES[step.weight_decay_mode],
        scale_parameter=step.scale_parameter,
        lr=step.lr,
        clamp_eps=layout.eps_placement is EpsPlacement.CLAMPED,
    )
