"""Parts of a sum over slices give the same bits however they were added up on the way."""

from __future__ import annotations

import itertools
from operator import add

from hypothesis import given
from hypothesis import strategies as st
from tests.wire.trees import leaves_of

from adashard.wire.placement import merged

counts = st.sampled_from([1, 2, 4, 8, 16, 32])
# Of so many sizes that an addition in another order is another number.
numbers = st.floats(-1e9, 1e9) | st.floats(-1.0, 1.0)
TREE = leaves_of(32)


def tree_sum(leaves):
    """The sum over the tree, from its root down."""
    if len(leaves) == 1:
        return leaves[0]
    half = len(leaves) // 2
    return tree_sum(leaves[:half]) + tree_sum(leaves[half:])


@st.composite
def leaves_and_runs(draw):
    """Leaves of a whole tree, and the borders of runs of them that lie together."""
    count = draw(counts)
    leaves = draw(st.lists(numbers, min_size=count, max_size=count))
    return leaves, [0, *sorted(draw(st.sets(st.integers(1, count)))), count]


@given(leaves_and_runs(), st.randoms(use_true_random=False))
def test_runs_merged_first_and_then_together_give_the_bits_of_the_tree(problem, random):
    leaves, borders = problem
    parts = [(place, 1, leaf) for place, leaf in enumerate(leaves)]
    runs = [merged(TREE, parts[start:stop], add) for start, stop in itertools.pairwise(borders)]
    while len(runs) > 1:  # neighbours in any order, as reports come in
        at = random.randrange(len(runs) - 1)
        runs[at : at + 2] = [merged(TREE, runs[at] + runs[at + 1], add)]
    assert runs == [[(0, len(leaves), tree_sum(leaves))]]


@given(counts, st.data())
def test_what_is_not_all_there_is_the_fewest_subtrees(count, data):
    """Each as large as may be: no two are siblings, and every leaf is in one."""
    there = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    found = merged(TREE, [(place, 1, 1) for place in there], add)
    covered = [leaf for place, width, _ in found for leaf in range(place, place + width)]
    assert covered == there
    for place, width, leaf_count in found:
        assert width == leaf_count
        assert width.bit_count() == 1
        assert place % width == 0
    for (place, width, _), right in itertools.pairwise(found):
        assert right[:2] != (place + width, width) or place % (2 * width) != 0


def test_the_earlier_part_comes_first():
    letters = [(place, 1, letter) for place, letter in enumerate("abcdefgh")]
    assert merged(TREE, letters, add) == [(0, 8, "abcdefgh")]
    assert merged(TREE, letters[1:7], add) == [(1, 1, "b"), (2, 2, "cd"), (4, 2, "ef"), (6, 1, "g")]


def test_nothing_merges_to_nothing():
    assert merged(TREE, [], add) == []
