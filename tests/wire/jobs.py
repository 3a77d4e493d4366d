"""Jobs: short ones to write in a test, and any that can be trained."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from adashard.wire.placement import (
    DEFAULT_SLICE_BYTES,
    DIMENSIONS_MAX,
    SLICE_BYTES_MAX,
    SLICE_BYTES_MIN,
    WORKERS_MAX,
)
from adashard.wire.spec import (
    AdafactorLayout,
    EpsPlacement,
    FactoredAxes,
    Group,
    JobSpec,
    Parameter,
    Recovery,
)


def job(*parameters: Parameter, **settings: Any) -> JobSpec:
    defaults: dict[str, Any] = {
        "groups": (Group(adafactor=AdafactorLayout()),),
        "slice_bytes": DEFAULT_SLICE_BYTES,
        "min_workers": 1,
    }
    return JobSpec(parameters=parameters, **(defaults | settings))


def tensor(name: str, *shape: int, group: int = 0) -> Parameter:
    return Parameter(name=name, shape=shape, group=group)


EMBEDDING, WEIGHT, BIAS = tensor("embedding", 9, 4), tensor("weight", 4, 4), tensor("bias", 4)

layouts = st.builds(
    AdafactorLayout,
    factored_axes=st.sampled_from([FactoredAxes.LAST_TWO, FactoredAxes.LARGEST_TWO]),
    min_dim_size_to_factor=st.integers(1, 128),
    momentum=st.booleans(),
    eps_placement=st.sampled_from([EpsPlacement.ADDED, EpsPlacement.CLAMPED]),
)
groups = st.lists(st.builds(Group, adafactor=layouts), min_size=1, max_size=3)
shapes = (
    st.lists(st.integers(1, 16), max_size=3) | st.lists(st.integers(1, 3), max_size=DIMENSIONS_MAX)
).map(tuple)
slice_bytes = st.sampled_from([SLICE_BYTES_MIN, SLICE_BYTES_MAX]) | st.integers(
    SLICE_BYTES_MIN, 2**12
)


@st.composite
def jobs(draw: st.DrawFn) -> JobSpec:
    """Any job that can be trained."""
    its_groups = draw(groups)
    large = any(group.adafactor.momentum for group in its_groups)
    names = draw(st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=9, unique=True))
    return JobSpec(
        parameters=tuple(
            Parameter(
                name=name, shape=draw(shapes), group=draw(st.integers(0, len(its_groups) - 1))
            )
            for name in names
        ),
        groups=tuple(its_groups),
        slice_bytes=draw(slice_bytes),
        min_workers=draw(st.integers(1, WORKERS_MAX)),
        recovery=draw(st.sampled_from([Recovery.WORKERS, Recovery.CHECKPOINT][large:])),
    )
