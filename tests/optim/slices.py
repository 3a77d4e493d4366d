"""A parameter cut into slices by hand, and steps of it through `SliceStep`: no server, no wire."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add

import torch
from hypothesis import strategies as st
from tests.wire.trees import leaves_of
from torch import Tensor

from adashard import schedule
from adashard.wire.placement import merged
from adashard_server.optim import adafactor, partials
from adashard_server.optim.adafactor import Measures, Settings, State, new_state
from adashard_server.optim.factored import Axes
from adashard_server.optim.layout import Layout
from adashard_server.optim.partials import Partial
from adashard_server.optim.passes import Passes
from adashard_server.optim.split import Measured, SliceStep

PAPER = Settings(
    eps1=1e-30,
    eps2=1e-3,
    clip_threshold=1.0,
    beta1=None,
    weight_decay=0.0,
    weight_decay_mode="alpha",
    scale_parameter=True,
    lr=0.0,
    clamp_eps=False,
)


@dataclass
class Piece:
    """One slice: where it begins along the cut, its tensors and its sum of X^2."""

    layout: Layout
    start: int
    weight: Tensor
    state: State
    squared_sum: float


class CutParameter:
    """A parameter in slices, and steps of it; tensors are copies.

    Args:
        weight: where it starts.
        axes: the factored ones.
        settings: of all steps.
        axis: the one that is cut; of no matter for a scalar.
        count: of slices, a power of two; 1 does not cut.
        passes: the loops.
        shards: first slices of shards but the first: partials are added up in each, then over all.
        order: in which slices are measured and applied; as they lie if not said.
        state: of the whole parameter; zero if not said.
    """

    def __init__(
        self,
        weight: Tensor,
        axes: Axes | None,
        settings: Settings,
        *,
        axis: int = 0,
        count: int = 1,
        passes: type[Passes] = Passes,
        shards: Sequence[int] = (),
        order: Sequence[int] | None = None,
        state: State | None = None,
    ) -> None:
        self.axes, self.settings, self.axis, self.passes = axes, settings, axis, passes
        self.shape = tuple(weight.shape)
        self._borders = (0, *shards, count)
        self._order = list(order or range(count))
        if state is None:
            momentum = settings.beta1 is not None
            state = new_state(self.shape, axes, momentum=momentum, dtype=weight.dtype)
        self.pieces = [self._piece(weight, state, place, count) for place in range(count)]

    def step(
        self, gradient: Tensor, *, beta2: float, rho: float, scale: float = 1.0
    ) -> list[Measures]:
        """One step with the gradient of the whole parameter; what each slice says it did."""
        steps = [
            SliceStep(piece.layout, self.settings, beta2=beta2, scale=scale, passes=self.passes)
            for piece in self.pieces
        ]
        gradients = [self._part(gradient, piece).reshape(-1).clone() for piece in self.pieces]
        measured = self.measured(steps, gradients)
        total = self._total([one.partial for one in measured])
        if self.settings.clamp_eps and self.pieces[0].layout.long is not None:
            total = self._with_clamped(steps, gradients, measured, total)
        found = {}
        for at in self._order:
            piece, short = self.pieces[at], measured[at].short
            if piece.layout.long is not None:
                short = steps[at].short(piece.state, total)
            found[at], piece.squared_sum = steps[at].apply(
                piece.weight, gradients[at], piece.state, measured[at], total, short, rho=rho
            )
        return [found[at] for at in range(len(self.pieces))]

    def measured(self, steps: Sequence[SliceStep], gradients: Sequence[Tensor]) -> list[Measured]:
        """What the first pass finds in each slice."""
        found = {
            at: steps[at].measure(gradients[at], self.pieces[at].state, self.pieces[at].squared_sum)
            for at in self._order
        }
        return [found[at] for at in range(len(self.pieces))]

    @property
    def weight(self) -> Tensor:
        """The weight, put together in memory of its own."""
        return self._joined([piece.weight.view(piece.layout.shape) for piece in self.pieces])

    @property
    def state(self) -> State:
        """The state, put together as well; a factor that all slices have is the same in all."""
        return State(
            row=self._factor([piece.state.row for piece in self.pieces], dropped=1),
            column=self._factor([piece.state.column for piece in self.pieces], dropped=0),
            full=self._joined([piece.state.full for piece in self.pieces]),
            momentum=self._joined([piece.state.momentum for piece in self.pieces]),
        )

    # --- cutting and putting together -----------------------------------------------------------

    def _piece(self, weight: Tensor, state: State, place: int, count: int) -> Piece:
        length = self.shape[self.axis] if self.shape else 1
        start, stop = place * length // count, (place + 1) * length // count
        shape = list(self.shape)
        if shape:
            shape[self.axis] = stop - start
        layout = Layout(shape, self.shape, self.axes, self.axis if count > 1 else None)
        piece = Piece(layout, start, weight, state, 0.0)
        piece.weight = self._part(weight, piece).reshape(-1).clone()
        piece.state = State(
            row=self._factor_part(state.row, piece, dropped=1),
            column=self._factor_part(state.column, piece, dropped=0),
            full=None if state.full is None else _copy(self._part(state.full, piece)),
            momentum=None if state.momentum is None else _copy(self._part(state.momentum, piece)),
        )
        piece.squared_sum = self.passes.square_sum(piece.weight.view(1, -1))
        return piece

    def _part(self, tensor: Tensor, piece: Piece, axis: int | None = None) -> Tensor:
        if not self.shape:
            return tensor
        length = piece.layout.shape[self.axis]
        return tensor.narrow(self.axis if axis is None else axis, piece.start, length)

    def _factor_part(self, factor: Tensor | None, piece: Piece, *, dropped: int) -> Tensor | None:
        if factor is None or self.axes is None:
            return None
        axis = self.axes[dropped]
        if axis == self.axis:
            return _copy(factor)
        return _copy(self._part(factor, piece, self.axis - (axis < self.axis)))

    def _joined(self, parts: Sequence[Tensor | None], axis: int | None = None) -> Tensor | None:
        if parts[0] is None:
            return None
        if not self.shape:
            return parts[0].clone()
        return torch.cat(list(parts), self.axis if axis is None else axis)

    def _factor(self, parts: Sequence[Tensor | None], *, dropped: int) -> Tensor | None:
        if parts[0] is None or self.axes is None:
            return None
        axis = self.axes[dropped]
        if axis == self.axis:
            assert all(torch.equal(part, parts[0]) for part in parts)
            return parts[0].clone()
        return self._joined(parts, self.axis - (axis < self.axis))

    # --- the exchange ---------------------------------------------------------------------------

    def _total(self, parts: Sequence[Partial]) -> Partial:
        """Added up in each shard, then what is left over all shards."""
        leaves = leaves_of(len(parts))
        found = list[tuple[int, int, Partial]]()
        for start, stop in itertools.pairwise(self._borders):
            of_shard = [(place, 1, parts[place]) for place in range(start, stop)]
            found += merged(leaves, of_shard, add)
        ((place, count, total),) = merged(leaves, found, add)
        assert (place, count) == (0, len(parts))
        return total

    def _with_clamped(
        self,
        steps: Sequence[SliceStep],
        gradients: Sequence[Tensor],
        measured: Sequence[Measured],
        total: Partial,
    ) -> Partial:
        """The second exchange, of sums that were taken element by element."""
        clamped = [
            partials.alone(0.0, step.clamped(gradient, one, step.short(piece.state, total)))
            for step, gradient, one, piece in zip(
                steps, gradients, measured, self.pieces, strict=True
            )
        ]
        return dataclasses.replace(
            total, update_squared_sum=self._total(clamped).update_squared_sum
        )


class WholeParameter:
    """The same steps by the readable reference, uncut."""

    def __init__(self, weight: Tensor, axes: Axes | None, settings: Settings) -> None:
        self.weight, self.axes, self.settings = weight.clone(), axes, settings
        momentum = settings.beta1 is not None
        self.state = new_state(weight.shape, axes, momentum=momentum, dtype=weight.dtype)

    def step(
        self, gradient: Tensor, *, beta2: float, rho: float, scale: float = 1.0
    ) -> list[Measures]:
        """One step with the gradient of the whole parameter."""
        mean = gradient * scale
        settings, axes = self.settings, self.axes
        return [adafactor.step(self.weight, mean, self.state, axes, settings, beta2=beta2, rho=rho)]


def run(
    parameter: CutParameter | WholeParameter,
    gradients: Sequence[Tensor],
    *,
    rho: float = 1e-2,
    scale: float = 1.0,
) -> list[Measures]:
    """Steps through the gradients with the paper's decay; what the first slice says of each."""
    return [
        parameter.step(gradient, beta2=schedule.beta2(count, -0.8), rho=rho, scale=scale)[0]
        for count, gradient in enumerate(gradients, start=1)
    ]


def tensors_of(state: State) -> dict[str, Tensor]:
    """The tensors that a state has, by name."""
    named = {name: getattr(state, name) for name in ("row", "column", "full", "momentum")}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def held_by(parameter: CutParameter | WholeParameter) -> dict[str, Tensor]:
    """Weight and state of the whole parameter, by name."""
    return {"weight": parameter.weight, **tensors_of(parameter.state)}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


# --- what hypothesis draws ------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """How a parameter is factored, cut and given to shards."""

    shape: tuple[int, ...]
    axes: Axes | None
    axis: int
    count: int
    shards: tuple[int, ...]
    order: tuple[int, ...]

    def of(self, weight: Tensor, settings: Settings, passes: type[Passes] = Passes) -> CutParameter:
        """The parameter, cut."""
        return CutParameter(
            weight,
            self.axes,
            settings,
            axis=self.axis,
            count=self.count,
            passes=passes,
            shards=self.shards,
            order=self.order,
        )


@st.composite
def cuts(
    draw: st.DrawFn,
    sizes: st.SearchStrategy[int] = st.integers(1, 9),  # noqa: B008
    *,
    axis_counts: tuple[int, int] = (0, 4),
    factored: bool = False,
    least_count: int = 1,
) -> Cut:
    """Any shape, any two of its axes factored or none, cut along any in up to 8 slices.

    Args:
        sizes: of axes.
        axis_counts: the fewest and the most.
        factored: whether there are factored axes for sure; takes two axes.
        least_count: of slices; no more than the least size.
    """
    shape = tuple(draw(st.lists(sizes, min_size=axis_counts[0], max_size=axis_counts[1])))
    axes = None
    if len(shape) >= 2 and (factored or draw(st.booleans())):
        axes = Axes(*draw(st.permutations(range(len(shape))))[:2])
    axis = draw(st.integers(0, max(0, len(shape) - 1)))
    length = shape[axis] if shape else 1
    count = draw(st.sampled_from([n for n in (1, 2, 4, 8) if least_count <= n <= length]))
    shards = draw(st.sets(st.integers(1, count - 1))) if count > 1 else ()
    order = draw(st.permutations(range(count)))
    return Cut(shape, axes, axis, count, tuple(sorted(shards)), tuple(order))


@st.composite
def any_settings(draw: st.DrawFn) -> Settings:
    """Any hyper-parameters; eps1 added, or as a bound that binds often, sometimes or never."""
    clamp = draw(st.booleans())
    return Settings(
        eps1=draw(st.sampled_from([1e-16, 0.1, 1.0] if clamp else [1e-30, 1e-3])),
        eps2=1e-3,
        clip_threshold=draw(st.sampled_from([0.3, 1.0, float("inf")])),
        beta1=draw(st.sampled_from([None, 0.0, 0.9])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        weight_decay_mode=draw(st.sampled_from(["alpha", "lr", "plain"])),
        scale_parameter=draw(st.booleans()),
        lr=0.3,
        clamp_eps=clamp,
    )


def drawn(
    shape: Sequence[int], seed: int, *, steps: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    """A weight and gradients of RMS about 1: a row, a column and a step of them next to zero."""
    random = torch.Generator().manual_seed(seed)
    weight, *gradients = (
        torch.randn(tuple(shape), generator=random, dtype=torch.float64) for _ in range(steps + 1)
    )
    for axis, size in enumerate(shape):
        index = int(torch.randint(size, (), generator=random))
        gradients[0].select(axis, index).mul_(0.01)
    return weight.to(dtype), [gradient.to(dtype) for gradient in gradients]
