"""What the factors say of the whole moment."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adashard_server.optim import factored
from adashard_server.optim.factored import Axes


def test_row_means_keep_the_row_axis_and_column_means_the_column_axis():
    squared = torch.arange(24.0).reshape(2, 3, 4)
    axes = Axes(row=0, column=2)
    rows, columns = factored.row_means(squared, axes), factored.column_means(squared, axes)
    assert rows.shape == factored.row_shape(squared.shape, axes) == (2, 3)
    assert columns.shape == factored.column_shape(squared.shape, axes) == (3, 4)
    assert rows[1, 2] == squared[1, 2, :].mean()
    assert columns[2, 3] == squared[:, 2, 3].mean()


@given(beta2=st.floats(0, 1, exclude_max=True), old=st.floats(0, 1e6), latest=st.floats(0, 1e6))
def test_decay_is_the_weighted_mean_in_place(beta2, old, latest):
    moment, mean = torch.tensor([old]).double(), torch.tensor([latest]).double()
    memory = moment.data_ptr()
    factored.decay(moment, mean, beta2)
    assert moment.data_ptr() == memory
    assert moment.item() == pytest.approx(beta2 * old + (1 - beta2) * latest)
    assert mean.item() == torch.tensor([latest]).double().item()


positive = st.floats(0.01, 100.0)


@given(
    rows=st.lists(positive, min_size=1, max_size=6),
    columns=st.lists(positive, min_size=1, max_size=6),
)
def test_a_moment_of_rank_one_is_recovered_exactly(rows, columns):
    moment = torch.outer(torch.tensor(rows).double(), torch.tensor(columns).double())
    root = estimate(moment)
    torch.testing.assert_close(root, moment.rsqrt())


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_other_matrix_of_rank_one_is_closer_in_the_paper_s_divergence(seed):
    """V_ij = R_i C_j / mean(R) minimises sum of V log(V/W) - V + W over W of rank 1."""
    random = torch.Generator().manual_seed(seed)
    moment = torch.rand(4, 5, generator=random, dtype=torch.float64) + 0.01

    def divergence(other):
        return (moment * (moment / other).log() - moment + other).sum().item()

    best = estimate(moment) ** -2
    u = torch.randn(4, 1, generator=random, dtype=torch.float64)
    v = torch.randn(1, 5, generator=random, dtype=torch.float64)
    assert divergence(best * (0.01 * u).exp() * (0.01 * v).exp()) >= divergence(best)


def test_factors_far_apart_in_size_neither_underflow_nor_overflow():
    """R C would be 1e-60 here, 0 in float32; its inverse root is 1e30 and fits."""
    row, column = torch.full((2,), 1e-30), torch.full((3,), 1e-30)
    root = factored.inverse_root_of_product(row, column, Axes(0, 1), floor=1e-38)
    torch.testing.assert_close(root, torch.full((2, 3), 1e15))
    row[0] = 1.0
    root = factored.inverse_root_of_product(row, column, Axes(0, 1), floor=1e-38)
    torch.testing.assert_close(root[1], torch.full((3,), 1e30 / math.sqrt(2)))


def test_the_floor_is_a_lower_bound_of_the_mean_of_the_row_means():
    row, column = torch.tensor([1.0, 3.0]), torch.tensor([4.0])
    unbound = factored.inverse_root_of_product(row, column, Axes(0, 1), floor=1.0)
    torch.testing.assert_close(unbound, torch.tensor([[2.0], [6.0]]).rsqrt())
    bound = factored.inverse_root_of_product(row, column, Axes(0, 1), floor=8.0)
    torch.testing.assert_close(bound, torch.tensor([[0.5], [1.5]]).rsqrt())


def test_the_inverse_root_of_nothing_is_nothing_and_a_nan_is_not_hidden():
    found = factored.inverse_root(torch.tensor([0.0, 4.0, torch.nan]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, torch.nan]), equal_nan=True)


def estimate(moment):
    axes = Axes(0, 1)
    return factored.inverse_root_of_product(
        factored.row_means(moment, axes), factored.column_means(moment, axes), axes, floor=1e-300
    )
