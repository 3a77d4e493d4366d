"""A model is cut by its shapes alone, into slices that are the leaves of trees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.jobs import BIAS, EMBEDDING, WEIGHT, job, jobs, layouts, tensor

from adashard.wire.placement import (
    CLUSTER_DEFAULT,
    WORKERS_MAX,
    Node,
    Slice,
    cut,
    factored_axes,
    nodes,
)
from adashard.wire.spec import AdafactorLayout, FactoredAxes, Group, JobSpec

# --- slices --------------------------------------------------------------------------------------


@given(jobs())
def test_slices_are_numbered_in_order_and_cover_every_parameter_exactly_once(spec: JobSpec):
    slices = cut(spec)
    assert [piece.index for piece in slices] == list(range(len(slices)))
    assert [piece.parameter for piece in slices] == sorted(piece.parameter for piece in slices)
    for pieces, parameter in zip(by_parameter(slices), spec.parameters, strict=True):
        reached = 0
        for piece in pieces:
            assert piece.axis == pieces[0].axis
            assert piece.start == reached < piece.stop
            reached = piece.stop
            whole = list(parameter.shape)
            if whole:
                whole[piece.axis] = piece.stop - piece.start
            assert piece.shape == tuple(whole)
        assert reached == (parameter.shape[pieces[0].axis] if parameter.shape else 1)
        assert sum(piece.element_count for piece in pieces) == math.prod(parameter.shape)


@given(jobs())
def test_a_slice_knows_its_place_among_those_of_its_parameter(spec: JobSpec):
    for pieces in by_parameter(cut(spec)):
        assert [piece.place for piece in pieces] == list(range(len(pieces)))
        assert {piece.count for piece in pieces} == {len(pieces)}
        assert {piece.first for piece in pieces} == {pieces[0].index}
        assert {piece.split for piece in pieces} == {len(pieces) > 1}
        assert len({piece.axes for piece in pieces}) == 1


@given(jobs())
def test_slices_of_a_parameter_are_as_few_as_a_power_of_two_allows_and_of_one_length(spec: JobSpec):
    for pieces in by_parameter(cut(spec)):
        count, lengths = len(pieces), [piece.stop - piece.start for piece in pieces]
        size = sum(piece.byte_count for piece in pieces)
        assert count.bit_count() == 1
        assert max(lengths) - min(lengths) <= 1
        assert size <= spec.slice_bytes * count or sum(lengths) < 2 * count
        assert count == 1 or size > spec.slice_bytes * (count // 2)


@given(st.integers(1, 2**12), st.integers(6, 12), st.integers(0, 6))
def test_larger_slices_along_one_axis_are_made_of_whole_smaller_ones(
    length: int, exponent: int, more: int
):
    fine, coarse = (
        {piece.start for piece in cut(job(tensor("w", length), slice_bytes=1 << power))}
        for power in (exponent, exponent + more)
    )
    assert coarse <= fine


@given(jobs())
def test_a_parameter_is_cut_the_same_whatever_else_is_in_the_job(spec: JobSpec):
    for number, pieces in enumerate(by_parameter(cut(spec))):
        alone = cut(replace(spec, parameters=(spec.parameters[number],)))
        first = pieces[0].index
        assert alone == tuple(replace(p, index=p.index - first, parameter=0) for p in pieces)


@given(jobs(), st.integers(1, WORKERS_MAX))
def test_slices_do_not_depend_on_workers(spec: JobSpec, min_workers: int):
    assert cut(spec) == cut(replace(spec, min_workers=min_workers))


@pytest.mark.parametrize(
    ("shape", "count", "axis", "lengths"),
    [
        ((), 1, 0, {1}),
        ((16,), 1, 0, {16}),
        ((17,), 2, 0, {8, 9}),
        ((100,), 8, 0, {12, 13}),
        ((4, 4), 1, 0, {4}),  # a matrix, along its longer axis
        ((4, 5), 2, 1, {2, 3}),
        ((8, 4), 2, 0, {4}),
        ((8, 8), 4, 0, {2}),  # of equals, into rows
        ((6, 6), 4, 0, {1, 2}),
        ((5, 5, 16), 16, 2, {1}),  # nothing is long enough for 32: the longest
        ((4, 4, 4), 4, 0, {1}),  # a batch of matrices, along it where it is long enough
        ((3, 4, 5), 4, 2, {1, 2}),
        ((2, 4, 4, 2), 4, 1, {1}),
        ((2, 2, 4, 4), 4, 2, {1}),
        ((2, 3, 2, 2), 2, 0, {1}),
        ((3, 3, 3, 3), 2, 0, {1, 2}),  # nothing is long enough for 8: the first of the longest
        ((3, 3, 3, 4), 4, 3, {1}),
        ((1, 1, 1), 1, 0, {1}),
    ],
)
def test_axis_and_number_of_slices_by_shape(shape, count, axis, lengths):
    pieces = cut(job(tensor("w", *shape), slice_bytes=64))
    assert (len(pieces), {piece.axis for piece in pieces}) == (count, {axis})
    assert {piece.stop - piece.start for piece in pieces} == lengths


def test_the_axes_that_are_factored_decide_along_which_axis_a_tensor_is_cut():
    def cut_axis(**layout: Any) -> int:
        its_groups = (Group(adafactor=AdafactorLayout(**layout)),)
        kernel = tensor("convolution", 16, 32, 4, 8)
        return cut(job(kernel, groups=its_groups, slice_bytes=8192))[0].axis

    assert cut_axis(factored_axes=FactoredAxes.LAST_TWO) == 0
    assert cut_axis(factored_axes=FactoredAxes.LARGEST_TWO) == 3
    assert cut_axis(factored_axes=FactoredAxes.LARGEST_TWO, min_dim_size_to_factor=64) == 0


def test_slices_say_which_axes_of_their_parameter_are_factored():
    assert [piece.axes for piece in cut(job(WEIGHT, BIAS, tensor("batch", 2, 3, 4)))] == [
        (0, 1),
        None,
        (1, 2),
    ]


def test_bytes_are_those_of_float32():
    (piece,) = cut(job(EMBEDDING))
    assert (piece.element_count, piece.byte_count) == (36, 144)
    (scalar,) = cut(job(tensor("scale")))
    assert (scalar.element_count, scalar.byte_count, scalar.shape) == (1, 4, ())


def test_the_same_job_is_cut_once():
    spec = job(WEIGHT, BIAS)
    assert cut(spec) is cut(replace(spec, min_workers=1))


def test_a_job_is_not_cut_before_its_slice_bytes_are_known():
    with pytest.raises(AssertionError, match="cluster's default"):
        cut(job(WEIGHT, slice_bytes=CLUSTER_DEFAULT))


# --- factored axes -------------------------------------------------------------------------------

any_shapes = st.lists(st.integers(0, 9), max_size=5).map(tuple)


@given(any_shapes, layouts)
def test_factored_axes_are_two_different_ones_in_order_and_long_enough(
    shape: tuple[int, ...], layout: AdafactorLayout
):
    axes = factored_axes(shape, layout)
    if axes is not None:
        row, column = axes
        assert 0 <= row < column < len(shape)
        assert min(shape[row], shape[column]) >= layout.min_dim_size_to_factor


@given(any_shapes, st.integers(1, 9))
def test_no_axis_left_out_is_longer_than_the_largest_two(shape: tuple[int, ...], shortest: int):
    axes = factored_axes(shape, layout_of(FactoredAxes.LARGEST_TWO, shortest))
    if axes is None:
        assert len(shape) < 2 or sorted(shape)[-2] < shortest
    else:
        assert sorted(shape[axis] for axis in axes) == sorted(shape)[-2:]


@pytest.mark.parametrize(
    ("shape", "last_two", "largest_two", "last_two_from_4", "largest_two_from_4"),
    [
        ((), None, None, None, None),
        ((1,), None, None, None, None),
        ((1000,), None, None, None, None),
        ((7, 13), (0, 1), (0, 1), (0, 1), (0, 1)),
        ((1, 12), (0, 1), (0, 1), None, None),
        ((0, 12), None, None, None, None),
        ((3, 5, 8), (1, 2), (1, 2), (1, 2), (1, 2)),
        ((8, 5, 3), (1, 2), (0, 1), None, (0, 1)),
        ((4, 1, 6), (1, 2), (0, 2), None, (0, 2)),
        ((6, 4, 3, 3), (2, 3), (0, 1), None, (0, 1)),
        ((3, 3, 4, 6), (2, 3), (2, 3), (2, 3), (2, 3)),
        ((4, 4, 4), (1, 2), (1, 2), (1, 2), (1, 2)),
        ((4, 9, 4), (1, 2), (1, 2), (1, 2), (1, 2)),
        ((9, 4, 4), (1, 2), (0, 2), (1, 2), (0, 2)),
    ],
)
def test_factored_axes_by_shape(shape, last_two, largest_two, last_two_from_4, largest_two_from_4):
    found = [
        factored_axes(shape, layout_of(rule, shortest))
        for shortest in (1, 4)
        for rule in (FactoredAxes.LAST_TWO, FactoredAxes.LARGEST_TWO)
    ]
    assert found == [last_two, largest_two, last_two_from_4, largest_two_from_4]


def layout_of(rule: FactoredAxes, shortest: int) -> AdafactorLayout:
    return AdafactorLayout(factored_axes=rule, min_dim_size_to_factor=shortest)


# --- nodes ---------------------------------------------------------------------------------------


@given(jobs(), st.data())
def test_nodes_cover_what_is_held_exactly_once_and_in_order(spec: JobSpec, data: st.DataObject):
    slices = cut(spec)
    held = data.draw(subsets(len(slices)))
    covered = [
        n for node in nodes(slices, held) for n in range(node.slice, node.slice + node.count)
    ]
    assert covered == sorted(held)


@given(jobs(), st.data())
def test_nodes_are_subtrees_and_the_largest_there_are(spec: JobSpec, data: st.DataObject):
    slices = cut(spec)
    found = nodes(slices, data.draw(subsets(len(slices))))
    for node in found:
        first, last = slices[node.slice], slices[node.slice + node.count - 1]
        assert first.parameter == last.parameter
        assert node.count.bit_count() == 1
        assert first.place % node.count == 0
        sibling = first.first + (first.place ^ node.count)
        assert node.count == first.count or Node(slice=sibling, count=node.count) not in found


@given(jobs())
def test_who_holds_everything_has_one_node_for_each_parameter(spec: JobSpec):
    slices = cut(spec)
    assert nodes(slices, reversed(range(len(slices)))) == tuple(
        Node(slice=piece.index, count=piece.count) for piece in slices if not piece.place
    )


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([], []),
        ([0], [(0, 1)]),
        ([1, 2], [(1, 1), (2, 1)]),
        ([3, 2], [(2, 2)]),
        ([1, 2, 3, 4], [(1, 1), (2, 2), (4, 1)]),
        ([0, 1, 2, 3, 4, 5], [(0, 4), (4, 2)]),
        ([4, 5, 6, 7], [(4, 4)]),
        ([6, 7, 8, 9], [(6, 2), (8, 2)]),  # 8 begins another parameter
        ([7, 8, 9, 10], [(7, 1), (8, 2), (10, 1)]),
        ([0, 0, 1, 1], [(0, 2)]),
        (range(11), [(0, 8), (8, 2), (10, 1)]),
    ],
)
def test_nodes_of_a_parameter_in_eight_another_in_two_and_one_whole(held, expected):
    slices = cut(job(tensor("a", 128), tensor("b", 32), tensor("c", 16), slice_bytes=64))
    assert nodes(slices, held) == tuple(Node(slice=first, count=count) for first, count in expected)


def by_parameter(slices: Sequence[Slice]) -> list[list[Slice]]:
    pieces = itertools.groupby(slices, key=lambda piece: piece.parameter)
    return [list(group) for _, group in pieces]


def subsets(count: int) -> st.SearchStrategy[set[int]]:
    """Some of the numbers below `count`: any, and a run, which has larger subtrees."""
    run = st.tuples(st.integers(0, count), st.integers(0, count)).map(
        lambda ends: set(range(*sorted(ends)))
    )
    return run | st.sets(st.integers(0, count - 1))
