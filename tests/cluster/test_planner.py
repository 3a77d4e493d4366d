"""Slices are spread by bytes, the same way every time, and stay where they were."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adashard_server.cluster.planner import place

sizes_of_slices = st.lists(st.integers(1, 1 << 40), max_size=40)
shard_ids = st.lists(st.text(max_size=4), min_size=1, max_size=10, unique=True)


def loads(sizes: Sequence[int], placement: Sequence[int], shard_count: int) -> list[int]:
    """Bytes on each shard."""
    found = [0] * shard_count
    for size, owner in zip(sizes, placement, strict=True):
        found[owner] += size
    return found


def gpt2_small() -> list[tuple[int, ...]]:
    """Shapes of its 148 tensors; the head shares the embedding of tokens."""
    width, vocabulary, context, layers = 768, 50257, 1024, 12
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    block = norm + attention + norm + feed_forward
    return [(vocabulary, width), (context, width), *block * layers, *norm]


# --- promises ------------------------------------------------------------------------------------


@given(sizes_of_slices, shard_ids)
def test_every_slice_lies_on_exactly_one_shard_that_exists(sizes: list[int], shards: list[str]):
    placement = place(sizes, shards)
    assert len(placement) == len(sizes)
    assert set(placement) <= set(range(len(shards)))


@given(sizes_of_slices, shard_ids, st.data())
def test_a_slice_stays_where_it_is_and_the_others_find_a_place(
    sizes: list[int], shards: list[str], data: st.DataObject
):
    anywhere = st.sampled_from([*shards, "a shard that is gone"])
    previous = data.draw(st.dictionaries(st.integers(0, 50), anywhere))
    placement = place(sizes, shards, previous=previous)
    assert len(placement) == len(sizes)
    for number, owner in enumerate(placement):
        if previous.get(number) in shards:
            assert shards[owner] == previous[number]


@given(sizes_of_slices, shard_ids)
def test_a_placement_is_kept_when_nothing_has_changed(sizes: list[int], shards: list[str]):
    before = place(sizes, shards)
    previous = {number: shards[owner] for number, owner in enumerate(before)}
    assert place(sizes, shards, previous=previous) == before


@given(sizes_of_slices, shard_ids, st.randoms())
def test_the_order_in_which_shards_are_remembered_makes_no_difference(
    sizes: list[int], shards: list[str], random
):
    previous = [(number, shards[number % len(shards)]) for number in range(0, len(sizes), 2)]
    expected = place(sizes, shards, previous=dict(previous))
    random.shuffle(previous)
    assert place(sizes, shards, previous=dict(previous)) == expected


def test_ties_go_to_the_first_shard_and_the_first_slice():
    assert place([4, 4, 4, 4, 9], ["a", "b"]) == (1, 1, 1, 0, 0)
    assert place([1, 1, 1], ["a", "b", "c"]) == (0, 1, 2)


def test_more_shards_than_slices_leave_some_empty():
    assert place([5, 7], ["a", "b", "c", "d"]) == (1, 0)


def test_what_a_shard_that_is_gone_held_goes_to_the_least_loaded():
    assert place([5, 5, 2], ["b", "c"], previous={0: "a", 1: "b", 2: "a"}) == (1, 0, 0)


def test_no_slices_need_no_shard():
    assert place([], []) == ()


def test_slices_without_a_shard_are_a_mistake_in_the_program():
    with pytest.raises(ValueError, match="2 slices cannot be placed on no shard"):
        place([1, 2], [])
    with pytest.raises(ValueError, match="a shard is named twice: a, b, a"):
        place([1], ["a", "b", "a"])


# --- balance -------------------------------------------------------------------------------------


@given(sizes_of_slices.filter(bool), shard_ids)
def test_the_fullest_shard_holds_at_most_the_mean_and_most_of_the_largest_slice(
    sizes: list[int], shards: list[str]
):
    count = len(shards)
    fullest = max(loads(sizes, place(sizes, shards), count))
    assert count * fullest <= sum(sizes) + (count - 1) * max(sizes)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 3))
def test_the_fullest_shard_holds_at_most_four_thirds_of_the_best_placement(
    sizes: list[int], count: int
):
    best = min(
        max(loads(sizes, placement, count))
        for placement in itertools.product(range(count), repeat=len(sizes))
    )
    fullest = max(loads(sizes, place(sizes, [str(n) for n in range(count)]), count))
    assert 3 * count * fullest <= (4 * count - 1) * best


def test_gpt2_small_has_148_tensors():
    shapes = gpt2_small()
    assert len(shapes) == 148
    assert sum(map(math.prod, shapes)) == 124_439_808


@pytest.mark.parametrize("count", [2, 4, 8])
def test_gpt2_small_is_as_even_as_its_embedding_allows(count: int):
    sizes = [4 * math.prod(shape) for shape in gpt2_small()]
    held = loads(sizes, place(sizes, [f"shard-{n}" for n in range(count)]), count)
    assert max(held) <= 1.05 * max(sum(sizes) / count, max(sizes))
