"""Which gradients are not finite, whatever they look like."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adashard.gradients import gathered, listed, not_finite
from adashard.rows import coalesced_rows

FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
values = st.sampled_from([torch.nan, torch.inf, -torch.inf])
shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)


@st.composite
def gradients(draw: st.DrawFn) -> tuple[dict[int, torch.Tensor], list[int]]:
    """Gradients of a few parameters, and which of them got an element that is not finite."""
    made: dict[int, torch.Tensor] = {}
    broken: list[int] = []
    for index in sorted(draw(st.sets(st.integers(0, 20), max_size=5))):
        dtype = draw(st.sampled_from(FORMATS))
        largest = torch.finfo(dtype).max * draw(st.sampled_from([0.0, 1.0, -1.0]))
        one = torch.full(draw(shapes), largest, dtype=dtype)
        if draw(st.booleans()):
            one.view(-1)[draw(st.integers(0, one.numel() - 1))] = draw(values)
            broken.append(index)
        made[index] = one.t() if one.dim() == 2 and draw(st.booleans()) else one
    return made, broken


@given(gradients())
def test_those_with_one_element_that_is_not_finite_are_found_and_no_others(case):
    made, broken = case
    assert not_finite(made) == tuple(broken)


@pytest.mark.parametrize("rows", [[], [2], [0, 3]])
def test_of_a_gradient_in_rows_the_rows_are_looked_at(rows):
    def in_rows(value: float) -> torch.Tensor:
        filled = torch.full((len(rows), 2), value)
        given = torch.sparse_coo_tensor([rows], filled, (4, 2), check_invariants=True)
        return coalesced_rows("weight", given)

    assert not_finite({5: in_rows(1.0)}) == ()
    assert not_finite({5: in_rows(torch.nan)}) == ((5,) if rows else ())


def test_gradients_are_gathered_by_place_and_not_copied():
    here, there = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    there.grad = torch.ones(3)
    assert gathered([("here", here), ("there", there)]) == {1: there.grad}


def test_a_few_names_are_listed_and_the_rest_counted():
    assert listed(["a", "b", "c"]) == "'a', 'b', 'c'"
    assert listed([*"abcde"]) == "'a', 'b', 'c' and 2 more"
