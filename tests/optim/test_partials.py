"""Parts of a sum give the same bits however they were added up on the way."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from adashard_server.optim import partials
from adashard_server.optim.partials import Partial, merged

counts = st.sampled_from([1, 2, 4, 8, 16, 32])
# Of so many sizes that an addition in another order is another number.
numbers = st.floats(-1e9, 1e9) | st.floats(-1.0, 1.0)


def added(left, right):
    return left + right


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
    runs = [merged(parts[start:stop], added) for start, stop in itertools.pairwise(borders)]
    while len(runs) > 1:  # neighbours in any order, as reports come in
        at = random.randrange(len(runs) - 1)
        runs[at : at + 2] = [merged(runs[at] + runs[at + 1], added)]
    assert runs == [[(0, len(leaves), tree_sum(leaves))]]


@given(counts, st.data())
def test_what_is_not_all_there_is_the_fewest_subtrees(count, data):
    """Each as large as may be: no two are siblings, and every leaf is in one."""
    there = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    found = merged([(place, 1, 1) for place in there], added)
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
    assert merged(letters, added) == [(0, 8, "abcdefgh")]
    assert merged(letters[1:7], added) == [(1, 1, "b"), (2, 2, "cd"), (4, 2, "ef"), (6, 1, "g")]


def test_nothing_merges_to_nothing():
    assert merged([], added) == []


def test_both_parts_together_have_the_sums_of_both_and_the_lesser_least():
    def part(number):
        tensor = torch.full((2, 3), number)
        return Partial(
            weight_squared_sum=number,
            update_squared_sum=10 * number,
            least=-number,
            squares=tensor,
            ratios=2 * tensor,
        )

    total = part(1.0) + part(2.0)
    assert (total.weight_squared_sum, total.update_squared_sum, total.least) == (3.0, 30.0, -2.0)
    assert torch.equal(total.squares, torch.full((2, 3), 3.0))
    assert torch.equal(total.ratios, torch.full((2, 3), 6.0))


def test_parts_without_a_long_factor_are_two_numbers():
    total = partials.alone(1.0, 2.0) + partials.alone(3.0, 4.0)
    assert (total.weight_squared_sum, total.update_squared_sum) == (4.0, 6.0)
    assert total.least == math.inf
    assert total.squares.numel() == total.ratios.numel() == 0
