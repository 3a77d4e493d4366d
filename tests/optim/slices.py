"""A parameter cut into slices by hand, and steps of it through `SliceStep`: no server, no wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adashard_server.optim import adafactor
from adashard_server.optim.adafactor import Measures, Settings, State, new_state
from adashard_server.optim.factored import Axes
from adashard_server.optim.partials import Partial, merged
from adashard_server.optim.passes import Passes
from adashard_server.optim.split import Layout, SliceStep


@dataclass
class Piece:
    """One slice: where it begins along the cut, its tensors and its sum of X^2."""

    layout: Layout
    start: int
    weight: Tensor
    state: State
    squared_sum: float


class CutParameter:
    """A parameter in `count` slices along `axis`; each step goes through all of them."""

    def __init__(
        self,
        weight: Tensor,
        axes: Axes | None,
        settings: Settings,
        *,
        axis: int = 0,
        count: int = 1,
        passes: type[Passes] = Passes,
    ) -> None:
        self.settings, self.passes, self.axis, self.axes = settings, passes, axis, axes
        self.shape = tuple(weight.shape)
        self.pieces = [self._piece(weight, axes, k, count) for k in range(count)]

    def _piece(self, weight: Tensor, axes: Axes | None, k: int, count: int) -> Piece:
        length = self.shape[self.axis] if self.shape else 1
        start, stop = k * length // count, (k + 1) * length // count
        part = weight.narrow(self.axis, start, stop - start) if self.shape else weight
        part = part.clone(memory_format=torch.contiguous_format)
        layout = Layout(part.shape, self.shape, axes, self.axis if count > 1 else None)
        momentum = self.settings.beta1 is not None
        state = new_state(part.shape, axes, momentum=momentum, dtype=weight.dtype)
        rows = part.view(-1, part.shape[-1] if part.dim() else 1)
        return Piece(layout, start, part.view(-1), state, self.passes.square_sum(rows))

    def step(
        self, gradient: Tensor, *, beta2: float, rho: float, scale: float = 1.0
    ) -> list[Measures]:
        """One step with the gradient of the whole parameter; what each slice says it did."""
        steps = [
            SliceStep(piece.layout, self.settings, beta2=beta2, scale=scale, passes=self.passes)
            for piece in self.pieces
        ]
        gradients = [self._part(gradient, piece) for piece in self.pieces]
        measured = [
            step.measure(part, piece.state, piece.squared_sum)
            for step, part, piece in zip(steps, gradients, self.pieces, strict=True)
        ]
        total = self._total([one.partial for one in measured])
        if self.settings.clamp_eps and self.pieces[0].layout.long is not None:
            sums = [
                step.clamped(part, piece.state, one, total)
                for step, part, piece, one in zip(
                    steps, gradients, self.pieces, measured, strict=True
                )
            ]
            total = dataclass_with(total, update_squared_sum=sum(sums))
        found = []
        for step, part, piece, one in zip(steps, gradients, self.pieces, measured, strict=True):
            measures, piece.squared_sum = step.apply(
                piece.weight, part, piece.state, one, total, rho=rho
            )
            found.append(measures)
        return found

    def weight(self) -> Tensor:
        """The weight, put together."""
        parts = [piece.weight.view(piece.layout.shape) for piece in self.pieces]
        return torch.cat(parts, self.axis) if self.shape else parts[0]

    def factor(self, kind: str) -> Tensor:
        """ "row", "column", "full" or "momentum" of the whole parameter."""
        parts = [getattr(piece.state, kind) for piece in self.pieces]
        axis, axes = self.axis, self.axes
        if kind in ("row", "column") and axes is not None:
            dropped = axes.column if kind == "row" else axes.row
            if axis == dropped:
                assert all(torch.equal(part, parts[0]) for part in parts)
                return parts[0]
            axis -= dropped < axis
        return torch.cat(parts, axis) if self.shape else parts[0]

    def _part(self, gradient: Tensor, piece: Piece) -> Tensor:
        if not self.shape:
            return gradient.reshape(-1)
        length = piece.layout.shape[self.axis]
        return gradient.narrow(self.axis, piece.start, length).reshape(-1).clone()

    def _total(self, parts: Sequence[Partial]) -> Partial:
        ((_, _, total),) = merged(
            ((k, 1, part) for k, part in enumerate(parts)), lambda left, right: left + right
        )
        return total


def dataclass_with(partial: Partial, *, update_squared_sum: float) -> Partial:
    """The same sums with another one of squared updates."""
    return Partial(
        weight_squared_sum=partial.weight_squared_sum,
        update_squared_sum=update_squared_sum,
        least=partial.least,
        squares=partial.squares,
        ratios=partial.ratios,
    )


def whole_step(
    weight: Tensor, gradient: Tensor, state: State, axes: Axes | None, settings: Settings, **at: float
) -> Measures:
    """The readable reference, of a whole parameter."""
    return adafactor.step(weight, gradient, state, axes, settings, **at)
