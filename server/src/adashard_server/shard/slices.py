"""What a shard holds of one job: per slice the fp32 master weights, the optimizer state, the sum.

Storage only: which of it is current is decided in `rounds.py`, when it changes in `engine.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adashard.wire.messages import AdafactorStep, Record
from adashard.wire.placement import Slice
from adashard.wire.spec import AdafactorLayout, EpsPlacement, FactoredAxes, JobSpec, WeightDecayMode
from adashard_server.optim import adafactor
from adashard_server.optim.factored import Axes, factored_axes

_PIECE = 1 << 16

_DECAY_MODES: dict[WeightDecayMode, Literal["alpha", "lr", "plain"]] = {
    WeightDecayMode.ALPHA: "alpha",
    WeightDecayMode.LR: "lr",
    WeightDecayMode.PLAIN: "plain",
}


class SliceStore:
    """Weights, optimizer state and gradient sums of the slices on one device.

    Not thread-safe by itself: the engine sees to it that nobody writes a slice while another
    reads or writes the same.
    """

    def __init__(self, spec: JobSpec, slices: tuple[Slice, ...], device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self._slices = slices
        self._weights: dict[int, Tensor] = {}
        self._states: dict[int, adafactor.State] = {}
        self._sums: dict[int, Tensor] = {}

    def put(self, index: int, weight: Tensor) -> None:
        """Takes a whole slice with fresh optimizer state; `weight`, flat float32, is owned then."""
        piece = self._slices[index]
        self._weights[index] = weight.view(piece.shape)
        self._states[index] = adafactor.new_state(
            piece.shape,
            self._axes(index),
            momentum=self._layout(index).momentum,
            device=self.device,
        )

    def keep(self, indices: frozenset[int]) -> None:
        """Drops every slice that is not in `indices`."""
        for held in (self._weights, self._states, self._sums):
            for index in set(held) - indices:
                del held[index]

    def weight(self, index: int) -> Tensor:
        """The flat float32 master weights of a slice; a view."""
        return self._weights[index].view(-1)

    def add(self, index: int, start: int, addend: Tensor, *, share: float, first: bool) -> None:
        """Adds `share * addend` into the sum of a slice from element `start`, in place.

        Args:
            index: the slice.
            start: the first element.
            addend: flat, of any format that travels, on the CPU.
            share: how much it counts in the mean.
            first: whether it replaces what an older step left there.
        """
        total = self._sums.get(index)
        if total is None:
            count = self._slices[index].element_count
            total = self._sums[index] = torch.empty(count, dtype=torch.float32, device=self.device)
        part = total[start : start + addend.numel()]
        if first:
            part.copy_(addend)
            if share != 1.0:
                part.mul_(share)
        else:
            part.add_(addend.to(self.device), alpha=share)

    def squared_sum(self, index: int) -> float:
        """The sum of squares of a slice's full sum, in float64; not finite if an element is not."""
        # In pieces counted from the slice's start: a float64 copy of the whole would be twice its
        # size, and the order of the additions is the same on every machine with this torch.
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for piece in self._sums[index].split(_PIECE):
            wide = piece.double()
            total += torch.dot(wide, wide)
        return float(total)

    def apply(self, index: int, record: Record) -> adafactor.Measures:
        """Takes the step of `record` with the slice's sum, in place on weights, state and sum."""
        piece = self._slices[index]
        group = self.spec.parameters[piece.parameter].group
        step, layout = record.groups[group], self._layout(index)
        count = record.step_counts[piece.parameter]
        schedule = next(one for one in step.schedules if one.step_count == count)
        assert step.adafactor is not None
        gradient = self._sums[index].view(piece.shape)
        total_share = sum(record.shares)
        if total_share != 1.0:
            gradient.div_(total_share)
        return adafactor.step(
            self._weights[index],
            gradient,
            self._states[index],
            self._axes(index),
            _settings(step.adafactor, layout),
            beta2=schedule.beta2,
            rho=schedule.rho,
        )

    def weight_bytes(self) -> int:
        """Bytes of master weights held."""
        return sum(weight.nbytes for weight in self._weights.values())

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state held, by kind: row, column, vector, momentum."""
        total: dict[str, int] = {}
        for state in self._states.values():
            for kind, count in state.bytes_by_kind().items():
                total[kind] = total.get(kind, 0) + count
        return total

    def _layout(self, index: int) -> AdafactorLayout:
        group = self.spec.groups[self.spec.parameters[self._slices[index].parameter].group]
        assert group.adafactor is not None
        return group.adafactor

    def _axes(self, index: int) -> Axes | None:
        layout = self._layout(index)
        return factored_axes(
            self._slices[index].shape,
            largest_two=layout.factored_axes is FactoredAxes.LARGEST_TWO,
            min_dim_size_to_factor=layout.min_dim_size_to_factor,
        )


def _settings(step: AdafactorStep, layout: AdafactorLayout) -> adafactor.Settings:
    """The step's hyper-parameters in the words of the mathematics."""
    return adafactor.Settings(
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
