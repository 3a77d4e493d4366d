"""How a model is cut into slices, and when two models are the same.

A slice is the unit of placement, of versions and recovery, and the leaf of every sum. Both ends
derive the slices from the job's settings alone, so they are never sent: shapes, the layouts of the
groups and `slice_bytes` decide, and neither the number of shards nor who holds what.

The slices of a parameter are the leaves of one binary tree, over which its sums are formed. Their
number is a power of two, so that every subtree is full: an aligned run of slices is a node of the
tree, and a shard that holds it sends one sum for all of it. Why this is so, and what it costs, is
docs/decisions/0011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from adashard.wire.errors import InvalidRequest, UnsupportedParameter
from adashard.wire.schema import fields_of
from adashard.wire.spec import (
    AdafactorLayout,
    EpsPlacement,
    FactoredAxes,
    Group,
    JobSpec,
    Parameter,
    Recovery,
)

DEFAULT_SLICE_BYTES = 4 << 20

PARAMETERS_MAX = 200_000
NAME_LENGTH_MAX = 512
DIMENSIONS_MAX = 8
ELEMENTS_MAX = 1 << 40
SLICE_BYTES_MIN, SLICE_BYTES_MAX = 64, 1 << 30
SLICES_MAX = 1 << 20
CLUSTER_DEFAULT = 0  # a worker's slice_bytes that leaves the choice to the coordinator
WORKERS_MAX = 64

_FLOAT32_BYTES = 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A run along one axis of one parameter.

    Attributes:
        index: its number in the job: by parameter, then by place in the parameter.
        parameter: index into `JobSpec.parameters`.
        axis: the axis that is cut, the same for all slices of a parameter; 0 for a scalar.
        start: first index along `axis`.
        stop: one beyond the last index along `axis`.
        shape: its own shape: the parameter's, with `stop - start` at `axis`.
        place: its number among the slices of its parameter, and the leaf that it is in the one
            binary tree over which sums over that parameter go.
        count: how many slices its parameter has; a power of two.
        axes: the two factored axes, row before column; None if the parameter is not factored.
    """

    index: int
    parameter: int
    axis: int
    start: int
    stop: int
    shape: tuple[int, ...]
    place: int
    count: int
    axes: tuple[int, int] | None

    @property
    def split(self) -> bool:
        """Whether its parameter has more slices than this one, wherever they live."""
        return self.count > 1

    @property
    def first(self) -> int:
        """Index of the first slice of its parameter."""
        return self.index - self.place

    @property
    def element_count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def byte_count(self) -> int:
        """Bytes of its master weights, which are float32 whatever the worker computes in."""
        return _FLOAT32_BYTES * self.element_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A subtree of a parameter's tree: the run of slices that one partial sum stands for.

    Attributes:
        slice: index of the first slice of the run.
        count: how many slices; a power of two that divides the place of the first.
    """

    slice: int
    count: int


# --- slices and nodes ----------------------------------------------------------------------------


@lru_cache(maxsize=8)
def cut(spec: JobSpec) -> tuple[Slice, ...]:
    """The slices of a job, by index; together they cover every parameter exactly once.

    A parameter has as many slices as bring their mean size down to `slice_bytes`, rounded up to a
    power of two, but no more than its axis is long. They are cut along one axis, of lengths that
    differ by one at most.

    Args:
        spec: has passed `validate_spec`, and states its `slice_bytes`. The result is remembered
            for the specifications seen last.
    """
    assert spec.slice_bytes != CLUSTER_DEFAULT, "slices are cut once the cluster's default is known"
    slices = list[Slice]()
    for number, parameter in enumerate(spec.parameters):
        division = _division(spec, parameter)
        slices += _slices_of(len(slices), number, parameter.shape, division)
    return tuple(slices)


def factored_axes(shape: Sequence[int], layout: AdafactorLayout) -> tuple[int, int] | None:
    """The axes of a tensor that are factored, row before column; None keeps the full moment.

    Args:
        shape: of the tensor; with fewer than two axes there is nothing to factor.
        layout: its group's. By `LARGEST_TWO` the two longest axes are factored, of equals the last
            ones, instead of the last two. The rules differ for tensors like convolution kernels,
            whose last two axes are the window. Both axes must have `min_dim_size_to_factor`.
    """
    if len(shape) < 2:
        return None
    axes: Sequence[int] = range(len(shape))
    if layout.factored_axes is FactoredAxes.LARGEST_TWO:
        axes = sorted(axes, key=shape.__getitem__)
    row, column = sorted(axes[-2:])
    if min(shape[row], shape[column]) < layout.min_dim_size_to_factor:
        return None
    return row, column


def nodes(slices: Sequence[Slice], held: Iterable[int]) -> tuple[Node, ...]:
    """The largest subtrees whose slices are all held, in order of their slices.

    They are the fewest that cover what is held exactly once. A parameter that is not split is a
    subtree of one slice.

    Args:
        slices: all of the job, as from `cut`.
        held: indices of those that are held, in any order.
    """
    leaves = ((index, 1, None) for index in sorted(set(held)))
    subtrees = merged(slices, leaves, lambda *_: None)
    return tuple(Node(slice=first, count=count) for first, count, _ in subtrees)


def merged(
    slices: Sequence[Slice], parts: Iterable[tuple[int, int, T]], add: Callable[[T, T], T]
) -> list[tuple[int, int, T]]:
    """Adds up what is known of subtrees wherever two siblings are both there.

    Args:
        slices: all of the job, as from `cut`.
        parts: (first slice, number of slices, part) of subtrees; ascending, no slice in two.
        add: of two siblings, the earlier first.

    Returns:
        The parts of the largest subtrees that are whole, in the same form: one for each parameter
        of which all is there. The bits do not depend on how the parts were merged before.
    """
    found = list[tuple[int, int, T]]()
    for part in parts:
        found.append(part)
        while len(found) > 1 and _are_siblings(slices, *found[-2][:2], *found[-1][:2]):
            first, count, left = found[-2]
            found[-2:] = [(first, 2 * count, add(left, found[-1][2]))]
    return found


def _are_siblings(
    slices: Sequence[Slice], left: int, left_count: int, right: int, right_count: int
) -> bool:
    """Whether two subtrees, the left one before the right, are the halves of a larger one."""
    return (
        left_count == right_count
        and left + left_count == right
        and slices[left].parameter == slices[right].parameter
        and slices[left].place % (2 * left_count) == 0
    )


@dataclass(frozen=True, slots=True)
class _Division:
    """How a parameter is cut: its factored axes, the axis that is cut, the number of slices."""

    axes: tuple[int, int] | None
    axis: int
    count: int


def _division(spec: JobSpec, parameter: Parameter) -> _Division:
    layout = spec.groups[parameter.group].adafactor
    assert layout is not None
    return _division_of(parameter.shape, layout, spec.slice_bytes)


@lru_cache(maxsize=1024)  # a model has many parameters, and few shapes
def _division_of(shape: tuple[int, ...], layout: AdafactorLayout, slice_bytes: int) -> _Division:
    """How a tensor of `shape` is cut.

    Batch axes come first, as slices of a batch of matrices have their factors to themselves. Of
    the factored axes it is the longer one: a partial sum is as long as the other.
    """
    axes = factored_axes(shape, layout)
    if not shape:
        return _Division(axes, 0, 1)
    wanted = _power_of_two_from(-(-_FLOAT32_BYTES * math.prod(shape) // slice_bytes))
    candidates = list(range(len(shape)))
    if axes is not None:
        longer = max(axes, key=shape.__getitem__)
        candidates = [axis for axis in candidates if axis not in axes] + [longer]
    long_enough = (axis for axis in candidates if shape[axis] >= wanted)
    axis = next(long_enough, max(candidates, key=shape.__getitem__))
    return _Division(axes, axis, min(wanted, _power_of_two_to(shape[axis])))


def _power_of_two_from(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _power_of_two_to(most: int) -> int:
    return 1 << (most.bit_length() - 1)


def _slices_of(
    index: int, parameter: int, shape: tuple[int, ...], division: _Division
) -> Iterator[Slice]:
    """The slices of one parameter; `index` is that of the first."""
    axis, count = division.axis, division.count
    length = shape[axis] if shape else 1
    for place in range(count):
        start, stop = place * length // count, (place + 1) * length // count
        yield Slice(
            index=index + place,
            parameter=parameter,
            axis=axis,
            start=start,
            stop=stop,
            shape=shape if count == 1 else (*shape[:axis], stop - start, *shape[axis + 1 :]),
            place=place,
            count=count,
            axes=division.axes,
        )


# --- what a job may be ---------------------------------------------------------------------------


def validate_spec(spec: JobSpec) -> None:
    """Refuses a job that cannot be trained, with the first reason.

    How many slices there are is looked at where `slice_bytes` is stated: a job that leaves it to
    the cluster has to be validated again with the cluster's.

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
    _check_recovery(spec)
    names = dict[str, int]()
    for index, parameter in enumerate(spec.parameters):
        _check_parameter(index, parameter, group_count=len(spec.groups))
        first = names.setdefault(parameter.name, index)
        if first != index:
            raise InvalidRequest(
                f"parameters {first} and {index} have the same name {parameter.name!r}",
                parameter=parameter.name,
            )
    if spec.slice_bytes != CLUSTER_DEFAULT:
        _check_slice_count(spec)


def _check_recovery(spec: JobSpec) -> None:
    if spec.recovery is Recovery.UNSPECIFIED:
        raise InvalidRequest("a job says what a dead shard is rebuilt from", setting="recovery")
    if spec.recovery is Recovery.WORKERS:
        for index, group in enumerate(spec.groups):
            if group.adafactor and group.adafactor.momentum:
                raise InvalidRequest(
                    f"group {index} has a first moment, which no worker keeps: a dead shard of "
                    "the job is rebuilt from a checkpoint",
                    setting="recovery",
                )


def _check_slice_count(spec: JobSpec) -> None:
    """Counts the slices without cutting any: there may be far too many."""
    count = sum(_division(spec, parameter).count for parameter in spec.parameters)
    if count > SLICES_MAX:
        raise InvalidRequest(
            f"slice_bytes={spec.slice_bytes} cuts the model into {count} slices; "
            f"{SLICES_MAX} are allowed",
            remedy="Choose a larger slice_bytes=: twice the bytes make half the slices.",
            setting="slice_bytes",
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
    if mine.recovery is not theirs.recovery:
        ours, others = mine.recovery.name.lower(), theirs.recovery.name.lower()
        yield f"recovery: from {ours} here, from {others} in the job"


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
