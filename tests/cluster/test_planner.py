"""Slices are spread by bytes in runs, the same way every time, and stay where they were."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models import GPT2_SMALL, T5_11B, Shape, job_of

from adashard.wire.placement import Slice, cut, nodes
from adashard_server.cluster.planner import check_placement, place

ENTRY_BYTES, NODE_BYTES = 60, 8

shapes = st.lists(st.integers(1, 64), min_size=1, max_size=2).map(tuple)
models = st.builds(
    job_of, st.lists(shapes, max_size=9), slice_bytes=st.sampled_from([64, 512, 1 << 20])
).map(cut)
shard_ids = st.lists(st.text(max_size=4), min_size=1, max_size=10, unique=True)


def wholes(lengths: Sequence[int]) -> tuple[Slice, ...]:
    """Vectors of these lengths, which are not split."""
    return cut(job_of([(length,) for length in lengths], slice_bytes=1 << 62))


def vectors(*slice_counts: int) -> tuple[Slice, ...]:
    """Vectors of these numbers of slices, all of one size."""
    return cut(job_of([(16 * count,) for count in slice_counts], slice_bytes=64))


def names(count: int) -> list[str]:
    return [f"shard-{number}" for number in range(count)]


def loads(slices: Sequence[Slice], placement: Sequence[int], shard_count: int) -> list[int]:
    """Bytes on each shard."""
    found = [0] * shard_count
    for piece, owner in zip(slices, placement, strict=True):
        found[owner] += piece.byte_count
    return found


# --- promises ------------------------------------------------------------------------------------


@given(models, shard_ids)
def test_every_slice_lies_on_exactly_one_shard_that_exists(
    slices: tuple[Slice, ...], shards: list[str]
):
    check_placement(place(slices, shards), slice_count=len(slices), shard_count=len(shards))


@given(models, shard_ids, st.data())
def test_a_slice_stays_where_it_is_and_the_others_find_a_place(
    slices: tuple[Slice, ...], shards: list[str], data: st.DataObject
):
    anywhere = st.sampled_from([*shards, "a shard that is gone"])
    numbers = st.integers(0, len(slices) + 9)
    previous = data.draw(st.dictionaries(numbers, anywhere, max_size=40))
    placement = place(slices, shards, previous=previous)
    assert len(placement) == len(slices)
    for number, owner in enumerate(placement):
        if previous.get(number) in shards:
            assert shards[owner] == previous[number]


@given(models, shard_ids)
def test_a_placement_is_kept_when_nothing_has_changed(slices: tuple[Slice, ...], shards: list[str]):
    before = place(slices, shards)
    previous = {number: shards[owner] for number, owner in enumerate(before)}
    assert place(slices, shards, previous=previous) == before


@given(models, shard_ids, st.randoms())
def test_the_order_in_which_shards_are_remembered_makes_no_difference(
    slices: tuple[Slice, ...], shards: list[str], random
):
    previous = [(number, shards[number % len(shards)]) for number in range(0, len(slices), 2)]
    expected = place(slices, shards, previous=dict(previous))
    random.shuffle(previous)
    assert place(slices, shards, previous=dict(previous)) == expected


def test_ties_go_to_the_first_shard_and_the_first_slice():
    assert place(wholes([4, 4, 4, 4, 9]), ["a", "b"]) == (1, 1, 1, 0, 0)
    assert place(wholes([1, 1, 1]), ["a", "b", "c"]) == (0, 1, 2)


def test_more_shards_than_slices_leave_some_empty():
    assert place(wholes([5, 7]), ["a", "b", "c", "d"]) == (1, 0)


def test_what_a_shard_that_is_gone_held_goes_to_the_least_loaded():
    previous = {0: "a", 1: "b", 2: "a"}
    assert place(wholes([5, 5, 2]), ["b", "c"], previous=previous) == (1, 0, 0)


def test_no_slices_need_no_shard():
    assert place([], []) == ()


def test_slices_without_a_shard_are_a_mistake_in_the_program():
    with pytest.raises(ValueError, match="2 slices cannot be placed on no shard"):
        place(wholes([1, 2]), [])
    with pytest.raises(ValueError, match="a shard is named twice: a, b, a"):
        place(wholes([1]), ["a", "b", "a"])


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ((0, 1), "a placement of 2 slices for a job of 3"),
        ((0, 1, 1, 0), "a placement of 4 slices for a job of 3"),
        ((0, 2, 1), "slice 1 is placed on shard 2 of 2"),
        ((0, 1, -1), "slice 2 is placed on shard -1 of 2"),
    ],
)
def test_a_placement_that_does_not_cover_every_slice_once_is_refused(placement, words):
    with pytest.raises(ValueError, match=words):
        check_placement(placement, slice_count=3, shard_count=2)


# --- runs ----------------------------------------------------------------------------------------


@given(models.filter(bool), st.integers(1, 6))
def test_a_parameter_is_divided_only_where_the_least_loaded_shard_could_not_take_all_of_it(
    slices: tuple[Slice, ...], count: int
):
    placement = place(slices, names(count))
    held = loads(slices, placement, count)
    for _, group in itertools.groupby(slices, key=lambda piece: piece.parameter):
        pieces = list(group)
        size = sum(piece.byte_count for piece in pieces)
        if len({placement[piece.index] for piece in pieces}) > 1:
            assert (min(held) + size) * count > sum(held)


@pytest.mark.parametrize(
    ("slice_counts", "shard_count", "expected"),
    [
        ([8], 1, "00000000"),
        ([8], 2, "00001111"),
        ([8], 3, "00112201"),
        ([8], 4, "00112233"),
        ([8], 9, "01234567"),
        ([4, 4], 2, "00001111"),
        ([4, 2, 2], 2, "00001111"),
        ([2, 4, 1, 1], 2, "11000011"),
        ([1, 1, 1, 1, 8], 3, "222200001111"),
    ],
)
def test_a_shard_gets_a_run_of_slices(slice_counts, shard_count, expected):
    placement = place(vectors(*slice_counts), names(shard_count))
    assert "".join(map(str, placement)) == expected


def test_what_is_left_of_a_parameter_is_placed_in_runs_too():
    previous = dict.fromkeys([0, 1, 2, 3, 7], "gone") | dict.fromkeys([4, 5], "a") | {6: "b"}
    placement = place(vectors(8, 1), ["a", "b"], previous=previous)
    assert placement == (1, 1, 0, 0, 0, 0, 1, 1, 0)


# --- balance -------------------------------------------------------------------------------------


@given(models.filter(bool), shard_ids)
def test_the_fullest_shard_holds_at_most_the_mean_and_most_of_the_largest_slice(
    slices: tuple[Slice, ...], shards: list[str]
):
    count, sizes = len(shards), [piece.byte_count for piece in slices]
    fullest = max(loads(slices, place(slices, shards), count))
    assert count * fullest <= sum(sizes) + (count - 1) * max(sizes)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 3))
def test_the_fullest_shard_holds_at_most_four_thirds_of_the_best_placement_of_whole_parameters(
    lengths: list[int], count: int
):
    slices = wholes(lengths)
    best = min(
        max(loads(slices, placement, count))
        for placement in itertools.product(range(count), repeat=len(slices))
    )
    fullest = max(loads(slices, place(slices, names(count)), count))
    assert 3 * count * fullest <= (4 * count - 1) * best


def test_the_models_are_those_that_were_published():
    assert len(GPT2_SMALL) == 148
    assert sum(map(math.prod, GPT2_SMALL)) == 124_439_808
    assert [sum(len(shape) == axes for shape in T5_11B) for axes in (1, 2)] == [122, 387]
    assert sum(map(math.prod, T5_11B)) == 11_307_321_344


@pytest.mark.parametrize("shard_count", [2, 4, 8, 16])
@pytest.mark.parametrize(
    ("shapes", "most"), [(GPT2_SMALL, 1.04), (T5_11B, 1.0001)], ids=["gpt2-small", "t5-11b"]
)
def test_models_are_spread_evenly_at_the_default_slice_bytes(
    shapes: list[Shape], most: float, shard_count: int
):
    slices = cut(job_of(shapes))
    held = loads(slices, place(slices, names(shard_count)), shard_count)
    assert max(held) * shard_count <= most * sum(held)


# --- bytes of message ----------------------------------------------------------------------------


def reports(shapes: list[Shape], shard_count: int) -> list[int]:
    """Bytes of the report that each shard sends to each other in a step, from shapes alone."""
    slices = cut(job_of(shapes))
    placement = place(slices, names(shard_count))
    return [
        sum(node_bytes(slices[node.slice]) for node in nodes(slices, held))
        for held in (
            [index for index, owner in enumerate(placement) if owner == shard]
            for shard in range(shard_count)
        )
    ]


def node_bytes(piece: Slice) -> int:
    """A squared sum; of a split parameter also an entry, with two vectors if a factor is cut.

    The vectors run along the factored axis that is not cut, one for each matrix of a batch.
    """
    if not piece.split:
        return NODE_BYTES
    cuts_factor = piece.axes is not None and piece.axis in piece.axes
    vectors = 2 * 4 * piece.element_count // piece.shape[piece.axis] if cuts_factor else 0
    return NODE_BYTES + ENTRY_BYTES + vectors


def test_a_report_of_t5_11b_on_8_shards_stays_under_half_a_megabyte():
    assert max(reports(T5_11B, 8)) <= 500_000


def test_reports_of_gpt2_small_on_4_shards_stay_under_two_thousandths_of_a_push():
    push = 4 * sum(map(math.prod, GPT2_SMALL))
    assert (4 - 1) * sum(reports(GPT2_SMALL, 4)) <= 0.002 * push
