"""How a model is cut into slices, and when two models are the same.

A slice is the unit of placement, of versions and recovery, and the leaf of every sum. Both ends
derive the slices from the job's settings alone, so they are never sent: shapes and `slice_bytes`
decide, and neither the number of shards nor who holds what.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from adashard.wire.errors import InvalidRequest, UnsupportedParameter
from adashard.wire.schema import fields_of
from adashard.wire.spec import (
    AdafactorLayout,
    EpsPlacement,
    FactoredAxes,
    Group,
    JobSpec,
    Parameter,
)

DEFAULT_SLICE_BYTES = 4 << 20

PARAMETERS_MAX = 200_000
NAME_LENGTH_MAX = 512
DIMENSIONS_MAX = 8
ELEMENTS_MAX = 1 << 40
SLICE_BYTES_MIN, SLICE_BYTES_MAX = 4 << 10, 1 << 30
CLUSTER_DEFAULT = 0  # a worker's slice_bytes that leaves the choice to the coordinator
WORKERS_MAX = 64

_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A run along one axis of one parameter.

    Attributes:
        index: its number in the job: by parameter, then by place in the parameter.
        parameter: index into `JobSpec.parameters`.
        axis: the axis that is cut; 0 for a scalar.
        start: first index along `axis`.
        stop: one beyond the last index along `axis`.
        shape: its own shape: the parameter's, with `stop - start` at `axis`.
    """

    index: int
    parameter: int
    axis: int
    start: int
    stop: int
    shape: tuple[int, ...]

    @property
    def element_count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def byte_count(self) -> int:
        """Bytes of its master weights, which are float32 whatever the worker computes in."""
        return _FLOAT32_BYTES * self.element_count


def cut(spec: JobSpec) -> tuple[Slice, ...]:
    """The slices of a job, by index; together they cover every parameter exactly once.

    Every parameter is one slice for now. `spec` must have passed `validate_spec`.
    """
    return tuple(
        Slice(
            index=index,
            parameter=index,
            axis=0,
            start=0,
            stop=parameter.shape[0] if parameter.shape else 1,
            shape=parameter.shape,
        )
        for index, parameter in enumerate(spec.parameters)
    )


# --- what a job may be ---------------------------------------------------------------------------


def validate_spec(spec: JobSpec) -> None:
    """Refuses a job that cannot be trained, with the first reason.

    Raises:
        UnsupportedParameter: a tensor is empty, or too large.
        InvalidRequest: anything else is out of the limits above, or contradicts itself.
    """
    _check_range("parameters", len(spec.parameters), 1, PARAMETERS_MAX)
    _check_range("groups", len(spec.groups), 1, PARAMETERS_MAX)
    if spec.slice_bytes != CLUSTER_DEFAULT:
        _check_range("slice_bytes", spec.slice_bytes, SLICE_BYTES_MIN, SLICE_BYTES_MAX)
    _check_range("min_workers", spec.min_workers, 1, WORKERS_MAX)
    for index, group in enumerate(spec.groups):
        _check_group(index, group)
    names = dict[str, int]()
    for index, parameter in enumerate(spec.parameters):
        _check_parameter(index, parameter, group_count=len(spec.groups))
        first = names.setdefault(parameter.name, index)
        if first != index:
            raise InvalidRequest(
                f"parameters {first} and {index} have the same name {parameter.name!r}",
                parameter=parameter.name,
            )


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidRequest(f"{name} is {value}; {least} to {most} are allowed", setting=name)


def _check_group(index: int, group: Group) -> None:
    layout = group.adafactor
    if layout is None:
        raise InvalidRequest(f"group {index} names no optimizer that is known here")
    if layout.factored_axes is FactoredAxes.UNSPECIFIED:
        raise InvalidRequest(f"group {index} does not say which axes are factored")
    if layout.eps_placement is EpsPlacement.UNSPECIFIED:
        raise InvalidRequest(f"group {index} does not say where eps is placed")
    if layout.min_dim_size_to_factor < 1:
        raise InvalidRequest(
            f"min_dim_size_to_factor of group {index} is {layout.min_dim_size_to_factor}; "
            "1 or more is allowed"
        )


def _check_parameter(index: int, parameter: Parameter, *, group_count: int) -> None:
    name, shape = parameter.name, parameter.shape
    if not 1 <= len(name) <= NAME_LENGTH_MAX:
        raise InvalidRequest(
            f"the name of parameter {index} has {len(name)} characters; "
            f"1 to {NAME_LENGTH_MAX} are allowed"
        )
    if not 0 <= parameter.group < group_count:
        raise InvalidRequest(
            f"parameter {index} {name!r} is of group {parameter.group}, "
            f"and there are {group_count} groups",
            parameter=name,
        )
    if len(shape) > DIMENSIONS_MAX:
        raise UnsupportedParameter(
            f"parameter {index} {name!r} has {len(shape)} axes; {DIMENSIONS_MAX} are allowed",
            parameter=name,
        )
    if min(shape, default=1) < 1:
        raise UnsupportedParameter(
            f"parameter {index} {name!r} has no elements: its shape is {shape}", parameter=name
        )
    if math.prod(shape) > ELEMENTS_MAX:
        raise UnsupportedParameter(
            f"parameter {index} {name!r} has {math.prod(shape)} elements; "
            f"{ELEMENTS_MAX} are allowed",
            parameter=name,
        )


# --- whether two jobs are one --------------------------------------------------------------------


def first_difference(mine: JobSpec, theirs: JobSpec) -> str | None:
    """In one sentence, where a worker's model (`mine`) departs from its job's (`theirs`).

    Tensors come first, in registration order, then settings. `min_workers` may differ: it only
    says when the job may begin. None means that the two are the same.
    """
    return next(_differences(mine, theirs), None)


def _differences(mine: JobSpec, theirs: JobSpec) -> Iterator[str]:
    for index in range(max(len(mine.parameters), len(theirs.parameters))):
        yield from _differences_at(index, mine, theirs)
    if len(mine.groups) != len(theirs.groups):
        yield f"groups: {len(mine.groups)} here, {len(theirs.groups)} in the job"
    for index, (here, there) in enumerate(zip(mine.groups, theirs.groups, strict=False)):
        yield from _group_differences(index, here, there)
    if mine.slice_bytes not in (CLUSTER_DEFAULT, theirs.slice_bytes):
        yield f"slice_bytes: {mine.slice_bytes} here, {theirs.slice_bytes} in the job"


def _differences_at(index: int, mine: JobSpec, theirs: JobSpec) -> Iterator[str]:
    """How the tensors of one index differ, if they do."""
    here, there = (
        spec.parameters[index] if index < len(spec.parameters) else None for spec in (mine, theirs)
    )
    if here is None or there is None or here.name != there.name:
        yield _misfit(index, here, there, mine, theirs)
    elif here.shape != there.shape:
        yield f"parameter {index} {here.name!r}: {here.shape} here, {there.shape} in the job"
    elif here.group != there.group:
        yield (
            f"parameter {index} {here.name!r}: in group {here.group} here, "
            f"in group {there.group} in the job"
        )


def _misfit(
    index: int, here: Parameter | None, there: Parameter | None, mine: JobSpec, theirs: JobSpec
) -> str:
    """What it means that two tensors of one index do not have one name."""
    unknown_there = here and here.name not in {parameter.name for parameter in theirs.parameters}
    unknown_here = there and there.name not in {parameter.name for parameter in mine.parameters}
    if here and (there is None or (unknown_there and not unknown_here)):
        return f"parameter {index} {here.name!r} {here.shape} is not in the job"
    if there and (here is None or (unknown_here and not unknown_there)):
        return f"parameter {index} {there.name!r} {there.shape} of the job is missing here"
    assert here is not None
    assert there is not None
    return (
        f"parameter {index} is {here.name!r} {here.shape} here, "
        f"{there.name!r} {there.shape} in the job"
    )


def _group_differences(index: int, here: Group, there: Group) -> Iterator[str]:
    """How the layouts of two groups differ, setting by setting."""
    if here.adafactor is None or there.adafactor is None:
        if here != there:
            yield f"group {index} has another optimizer here than in the job"
        return
    for field in fields_of(AdafactorLayout):
        ours, their = (getattr(group.adafactor, field.name) for group in (here, there))
        if ours != their:
            yield f"group {index}, {field.name}: {_text(ours)} here, {_text(their)} in the job"


def _text(setting: object) -> str:
    """A setting as its user writes it."""
    return (
        setting.name.lower() if isinstance(setting, FactoredAxes | EpsPlacement) else str(setting)
    )
