"""Jobs and optimizer states of every kind, and a state on its way through shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from hypothesis import strategies as st
from tests.shard.tables import piece
from torch import Tensor

from adashard.arrivals import Arrivals
from adashard.state import MOMENTS, Gathering, State, moment_shapes, part_of
from adashard.wire.frames import data_frame
from adashard.wire.messages import Content, Run
from adashard.wire.placement import Slice, cut
from adashard.wire.spec import AdafactorLayout, FactoredAxes, Group, JobSpec, Parameter

SHAPES = st.lists(st.integers(1, 9), max_size=4).map(tuple)
LAYOUTS = st.builds(
    AdafactorLayout,
    factored_axes=st.sampled_from([FactoredAxes.LAST_TWO, FactoredAxes.LARGEST_TWO]),
    min_dim_size_to_factor=st.integers(1, 4),
    momentum=st.booleans(),
)


@st.composite
def specs(draw: st.DrawFn, layouts: st.SearchStrategy[AdafactorLayout] = LAYOUTS) -> JobSpec:
    """Up to four parameters in two groups, cut into nearly nothing."""
    groups = draw(st.lists(layouts, min_size=2, max_size=2))
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=4))
    return JobSpec(
        parameters=tuple(
            Parameter(name=f"p{n}", shape=shape, group=int(n >= 2))
            for n, shape in enumerate(shapes)
        ),
        groups=tuple(Group(adafactor=layout) for layout in groups),
        slice_bytes=draw(st.sampled_from([64, 100, 256])),
        min_workers=1,
    )


def state_of(spec: JobSpec, version: int = 3, masters: tuple[int, ...] = ()) -> State:
    """A state whose elements all differ, so that none can be in another's place."""
    given = 0

    def filled(shape: tuple[int, ...]) -> Tensor:
        nonlocal given
        first, given = given + 1, given + math.prod(shape)
        return torch.arange(first, given + 1, dtype=torch.float32).view(shape)

    return State(
        version=version,
        step_counts=tuple(index % (version + 1) for index in range(len(spec.parameters))),
        moments=tuple(
            {
                content: filled(shape)
                for content, shape in moment_shapes(
                    one.shape, spec.groups[one.group].adafactor
                ).items()
            }
            for one in spec.parameters
        ),
        masters={index: filled(spec.parameters[index].shape) for index in masters},
    )


def weights_of(spec: JobSpec) -> list[Tensor]:
    return [torch.full(one.shape, -float(n + 1)) for n, one in enumerate(spec.parameters)]


def runs_of(
    state: State, weights: Sequence[Tensor], slices: Sequence[Slice], indices: Iterable[int]
) -> Iterator[tuple[Run, memoryview]]:
    """Slices with their state, as a shard that holds them sends them."""
    for index in indices:
        moments = state.moments[slices[index].parameter]
        whole = state.masters.get(slices[index].parameter, weights[slices[index].parameter])
        yield piece(index, part_of(whole, slices[index], Content.WEIGHT))
        for content in [one for one in MOMENTS if one in moments]:
            part = part_of(moments[content], slices[index], content)
            yield piece(index, part, content=content)


def frames_of(
    state: State, weights: Sequence[Tensor], slices: Sequence[Slice], indices: Iterable[int]
) -> Iterator[bytes]:
    """The same, each run in a frame of its own."""
    for run, buffer in runs_of(state, weights, slices, indices):
        yield data_frame([run], [buffer])


def gathered(state: State, spec: JobSpec, indices: list[int] | None = None) -> Gathering:
    """A gathering that has got the slices of a state."""
    slices = cut(spec)
    indices = list(range(len(slices))) if indices is None else indices
    gathering = Gathering(spec, state.version, masters=state.masters)
    receive(gathering, runs_of(state, weights_of(spec), slices, indices))
    return gathering


def receive(gathering: Gathering, runs: Iterable[tuple[Run, memoryview]]) -> None:
    """One stream of a shard's answer."""
    arrivals = Arrivals(gathering.parts)
    for run, buffer in runs:
        arrival = arrivals.take(run, buffer)
        if arrival is not None:
            gathering.receive(arrival)


def tensors_of(state: State) -> dict[tuple[int, Content], Tensor]:
    """All tensors of a state by name."""
    found = {
        (index, content): moment
        for index, moments in enumerate(state.moments)
        for content, moment in moments.items()
    }
    return found | {(index, Content.WEIGHT): one for index, one in state.masters.items()}


def same(one: State, other: State) -> bool:
    """Whether two states are equal bit for bit, masters included."""
    mine, theirs = tensors_of(one), tensors_of(other)
    return (
        (one.version, one.step_counts) == (other.version, other.step_counts)
        and mine.keys() == theirs.keys()
        and all(torch.equal(mine[name], theirs[name]) for name in mine)
    )
