"""What a shard holds of one job: per slice the fp32 master weights, the optimizer state, the sum.

Storage only: which of it is current is decided in `rounds.py`, when it changes in `engine.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adashard.wire.messages import Content, Exchange, Record
from adashard.wire.placement import Slice
from adashard.wire.spec import AdafactorLayout, JobSpec
from adashard.wire.tensors import element_count
from adashard_server.optim import adafactor
from adashard_server.optim.adafactor import State
from adashard_server.optim.compiled import CompiledPasses
from adashard_server.optim.factored import Axes
from adashard_server.optim.layout import Layout
from adashard_server.optim.partials import alone
from adashard_server.optim.passes import Passes
from adashard_server.optim.split import Measured
from adashard_server.shard.partials import Finding
from adashard_server.shard.stepping import Stepping

_KINDS = {
    Content.ROW: "row",
    Content.COLUMN: "column",
    Content.VECTOR: "full",
    Content.MOMENTUM: "momentum",
}
_CONTENTS = {
    "row": Content.ROW,
    "column": Content.COLUMN,
    "vector": Content.VECTOR,
    "momentum": Content.MOMENTUM,
}


@dataclass(slots=True)
class _Held:
    """One slice: its place in the parameter, weights, state, and the sum of squared weights."""

    layout: Layout
    weight: Tensor
    state: State
    squared_sum: float


class SliceStore:
    """Weights, optimizer state and gradient sums of the slices on one device.

    Not thread-safe by itself: the engine sees to it that nobody writes a slice while another
    reads or writes the same.
    """

    def __init__(self, spec: JobSpec, slices: tuple[Slice, ...], device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.passes: type[Passes] = CompiledPasses if device.type == "cpu" else Passes
        self._slices = slices
        self._held: dict[int, _Held] = {}
        self._sums: dict[int, Tensor] = {}
        self._measured: dict[int, tuple[Stepping, Measured]] = {}
        self._stepping: Stepping | None = None

    # --- copies of whole slices -----------------------------------------------------------------

    def shapes(self, index: int) -> dict[Content, tuple[int, ...]]:
        """Shapes of what a slice consists of: its weights and the tensors of its state."""
        piece = self._slices[index]
        axes = Axes(*piece.axes) if piece.axes else None
        kinds = adafactor.state_shapes(piece.shape, axes, momentum=self._group(index).momentum)
        state = {_CONTENTS[kind]: shape for kind, shape in kinds.items()}
        return {Content.WEIGHT: piece.shape, **state}

    def put(self, index: int, contents: Mapping[Content, Tensor]) -> None:
        """Takes a whole slice; what is not among `contents` is as of one that has no step.

        Args:
            index: the slice.
            contents: flat, float32, on the device; owned then. The weights are among them.
        """
        piece, shapes = self._slices[index], self.shapes(index)
        tensors = {
            _KINDS[content]: contents[content].view(shape)
            if content in contents
            else torch.zeros(shape, device=self.device)
            for content, shape in shapes.items()
            if content is not Content.WEIGHT
        }
        layout = self._layout(piece)
        weight = contents[Content.WEIGHT]
        rows = layout.as_matrices(weight).view(-1, layout.matrices[2])
        state = State(**{kind: tensors.get(kind) for kind in _KINDS.values()})
        self._held[index] = _Held(layout, weight, state, self.passes.square_sum(rows))
        self._measured.pop(index, None)

    def keep(self, indices: frozenset[int]) -> None:
        """Drops every slice that is not in `indices`."""
        for held in (self._held, self._sums, self._measured):
            for index in set(held) - indices:
                del held[index]

    def tensor(self, index: int, content: Content) -> Tensor:
        """What a slice consists of, flat float32; a view."""
        held = self._held[index]
        if content is Content.WEIGHT:
            return held.weight
        tensor: Tensor | None = getattr(held.state, _KINDS[content])
        assert tensor is not None
        return tensor.view(-1)

    # --- a step ---------------------------------------------------------------------------------

    def add(
        self, index: int, start: int, gap: int, addend: Tensor, *, share: float, first: bool
    ) -> None:
        """Adds `gap` zeros and then `share * addend` into a slice's sum from `start`, in place.

        Args:
            index: the slice.
            start: the first element.
            gap: how many zeros come before the addend.
            addend: flat, of any format that travels, on the CPU.
            share: how much it counts in the mean.
            first: whether it replaces what an older step left there.
        """
        total = self._sums.get(index)
        if total is None:
            count = self._slices[index].element_count
            total = self._sums[index] = torch.empty(count, dtype=torch.float32, device=self.device)
        if gap:
            zeros = total[start : start + gap]
            zeros.zero_() if first else zeros.add_(0.0)
        count = element_count(addend)
        if count:
            part = total[start + gap : start + gap + count]
            self.passes.accumulate(part, addend, share, first=first)

    def measure(self, index: int, exchange: Exchange, draft: Record) -> Finding:
        """What an exchange needs of a slice whose sum is full; changes nothing that lasts."""
        held, gradient, stepping = self._held[index], self._sums[index], self._step(draft)
        if exchange is Exchange.NORM:
            rows = held.layout.as_matrices(gradient).view(-1, held.layout.matrices[2])
            return Finding(self.passes.square_sum(rows, stepping.scale))
        step = stepping.of(self._slices[index], held.layout)
        if exchange is Exchange.CLAMPED:
            _, measured = self._measured[index]
            short = stepping.short(self._slices[index], step, held.state, measured)
            assert short is not None
            clamped = step.clamped(gradient, measured, short)
            return Finding(0.0, alone(0.0, clamped))
        measured = step.measure(gradient, held.state, held.squared_sum)
        self._measured[index] = stepping, measured
        partial = measured.partial if self._slices[index].split else None
        return Finding(measured.gradient_squared_sum, partial)

    def apply(self, index: int, record: Record) -> adafactor.Measures:
        """Takes the step of `record` with the slice's sum, in place on weights and state.

        What the slice has measured for the record's draft is used; where there is nothing of it,
        as after a change of generation, it is measured again, with the same bits.

        Returns:
            What the step did to the slice's parameter; its first slice alone tells the sum of
            squares of the update, so that sums over slices count it once.
        """
        piece, held, gradient = self._slices[index], self._held[index], self._sums[index]
        stepping = self._step(record)
        step = stepping.of(piece, held.layout)
        known = self._measured.pop(index, None)
        if known is not None and known[0].measures_as(stepping):
            measured = known[1]
        else:
            measured = step.measure(gradient, held.state, held.squared_sum)
        measures, held.squared_sum = step.apply(
            held.weight,
            gradient,
            held.state,
            measured,
            stepping.total(piece, measured),
            stepping.short(piece, step, held.state, measured),
            rho=stepping.rho(piece),
        )
        return measures if piece.place == 0 else replace(measures, update_squared_sum=0.0)

    # --- what people see ------------------------------------------------------------------------

    def weight_bytes(self) -> int:
        """Bytes of master weights held."""
        return sum(held.weight.nbytes for held in self._held.values())

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state held, by kind: row, column, vector, momentum."""
        total: dict[str, int] = {}
        for held in list(self._held.values()):
            for kind, count in held.state.bytes_by_kind().items():
                total[kind] = total.get(kind, 0) + count
        return total

    # --- inside ---------------------------------------------------------------------------------

    def _step(self, record: Record) -> Stepping:
        """What all slices need of a record or draft, worked out once."""
        stepping = self._stepping
        if stepping is None or stepping.record is not record:
            stepping = self._stepping = Stepping(self.spec, record, self.passes)
        return stepping

    def _layout(self, piece: Slice) -> Layout:
        whole = self.spec.parameters[piece.parameter].shape
        axes = Axes(*piece.axes) if piece.axes else None
        return Layout(piece.shape, whole, axes, piece.axis if piece.split else None)

    def _group(self, index: int) -> AdafactorLayout:
        parameter = self.spec.parameters[self._slices[index].parameter]
        layout = self.spec.groups[parameter.group].adafactor
        assert layout is not None
        return layout
