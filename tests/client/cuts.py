"""Models that are cut in any way: slices that the planner would not make, but the contract allows.

And the elements of slices as they travel, put together again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from tests.shard import jobs
from torch import Tensor

from adashard import routing as routing_module
from adashard.routing import Routing
from adashard.wire.frames import read_frame
from adashard.wire.messages import Run
from adashard.wire.placement import Slice
from adashard.wire.tensors import from_buffer, wire_dtype

FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Cut:
    """A tensor's shape, and where it is cut."""

    shape: tuple[int, ...]
    axis: int = 0
    borders: frozenset[int] = frozenset()

    def slices(self, parameter: int, first: int) -> Iterator[Slice]:
        length = self.shape[self.axis] if self.shape else 1
        marks = sorted({0, length, *self.borders})
        for place, (start, stop) in enumerate(itertools.pairwise(marks)):
            shape = list(self.shape)
            shape[self.axis : self.axis + 1] = [stop - start] if self.shape else []
            yield Slice(
                index=first + place,
                parameter=parameter,
                axis=self.axis,
                start=start,
                stop=stop,
                shape=tuple(shape),
                place=place,
                count=len(marks) - 1,
                axes=None,
            )


def cut_routing(cuts: Iterable[Cut], parameters: list[Tensor], **options) -> Routing:
    """Routing over these slices."""
    cuts = list(cuts)
    made = Routing(jobs.spec(*[cut.shape for cut in cuts]), parameters, **options)
    made.slices = ()
    for parameter, cut in enumerate(cuts):
        made.slices += tuple(cut.slices(parameter, len(made.slices)))
    return made


def part_of(tensor: Tensor, piece: Slice) -> Tensor:
    """The elements of a slice, flat, in memory of their own."""
    whole = tensor.detach()
    if piece.shape:
        whole = whole.narrow(piece.axis, piece.start, piece.stop - piece.start)
    return whole.reshape(-1).clone(memory_format=torch.contiguous_format)


@st.composite
def cuts(draw, least_axes: int = 0) -> Cut:
    shape = draw(st.lists(st.integers(1, 5), min_size=least_axes, max_size=4).map(tuple))
    axis = draw(st.integers(0, max(len(shape) - 1, 0)))
    inside = st.integers(1, shape[axis] - 1) if shape and shape[axis] > 1 else st.nothing()
    return Cut(shape, axis, draw(st.frozensets(inside)))


@st.composite
def tensors_of(draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose axes lie in memory in any order, and perhaps with gaps."""
    order = draw(st.permutations(range(len(shape))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    stored = torch.randn([shape[axis] for axis in order] + [2], generator=generator).to(dtype)
    stored = stored[..., 0] if draw(st.booleans()) else stored[..., 0].contiguous()
    return stored.permute([order.index(axis) for axis in range(len(shape))])


@st.composite
def models(draw) -> tuple[list[Cut], list[Tensor]]:
    drawn = draw(st.lists(cuts(), min_size=1, max_size=3))
    return drawn, [draw(tensors_of(one.shape, draw(st.sampled_from(FORMATS)))) for one in drawn]


# --- what travels ---------------------------------------------------------------------------------


def watch_sources(monkeypatch) -> list[int]:
    """Where in memory the elements of frames lie that are made from now on."""
    sources: list[int] = []
    original = routing_module.row_by_row

    def watched(part: Tensor) -> memoryview:
        buffer = original(part)
        sources.append(from_buffer(buffer, wire_dtype(part.dtype)).data_ptr())
        return buffer

    monkeypatch.setattr(routing_module, "row_by_row", watched)
    return sources


def received(frames) -> dict[int, Tensor]:
    """Flat tensors by slice, from frames."""
    found: dict[int, list[Tensor]] = {}
    for data in frames:
        for run, buffer in read_frame(data).pieces():
            found.setdefault(run.slice, []).append(from_buffer(buffer, run.dtype))
    return {index: torch.cat(parts) for index, parts in found.items()}


def runs_of(index: int, flat: Tensor, borders: list[int]):
    """The elements of a slice, cut at `borders`, as they would arrive."""
    cuts = sorted({0, flat.numel(), *(border for border in borders if border < flat.numel())})
    for start, stop in itertools.pairwise(cuts):
        part = flat[start:stop].contiguous()
        yield Run(slice=index, start=start, count=stop - start, dtype=wire_dtype(flat.dtype)), part
