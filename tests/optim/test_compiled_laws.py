"""Laws of Adafactor that hold for compiled slices, as they do for the readable reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.optim.slices import PAPER, CutParameter, cuts, drawn, held_by, run

from adashard_server.optim.compiled import CompiledPasses
from adashard_server.optim.factored import Axes

WITH_EVERYTHING = dataclasses.replace(PAPER, beta1=0.9, weight_decay=0.1, clip_threshold=0.7)

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 70)
matrices = st.tuples(sizes, sizes)
matrix_cuts = cuts(sizes, axis_counts=(2, 2), factored=True)


def away_from_zero(shape, seed, *, steps=4):
    """A weight, and gradients that the paper's eps1 is nothing beside."""
    weight, gradients = drawn(shape, seed, steps=steps)
    return weight, [gradient.sign() * (gradient.abs() + 0.1) for gradient in gradients]


def trajectory(weight, gradients, settings=PAPER, **cut):
    parameter = CutParameter(weight, Axes(0, 1), settings, passes=CompiledPasses, **cut)
    run(parameter, gradients)
    return parameter


@given(cut=cuts(), seed=seeds, exponent=st.integers(-20, 20))
def test_scaling_all_gradients_by_a_power_of_two_changes_no_bit(cut, seed, exponent):
    weight, gradients = away_from_zero(cut.shape, seed)
    plain, scaled = (cut.of(weight, WITH_EVERYTHING, CompiledPasses) for _ in range(2))
    measures = run(plain, gradients)
    assert measures == run(scaled, [gradient * 2.0**exponent for gradient in gradients])
    found = held_by(scaled)
    for name, tensor in held_by(plain).items():
        factor = 1.0 if name in ("weight", "momentum") else 4.0**exponent
        assert torch.equal(tensor * factor, found[name]), name


@given(shape=matrices, seed=seeds)
def test_permuted_rows_and_columns_take_permuted_steps(shape, seed):
    weight, gradients = drawn(shape, seed)
    random = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=random) for size in shape)

    def permuted(tensor):
        return tensor[rows][:, columns].contiguous()

    plain = trajectory(weight, gradients, WITH_EVERYTHING)
    moved = trajectory(permuted(weight), [permuted(one) for one in gradients], WITH_EVERYTHING)
    torch.testing.assert_close(permuted(plain.weight), moved.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.state.row[rows], moved.state.row, rtol=1e-5, atol=0)
    torch.testing.assert_close(plain.state.column[columns], moved.state.column, rtol=1e-5, atol=0)


@given(shape=matrices, seed=seeds, cut_axis=st.integers(0, 1))
def test_a_transposed_matrix_takes_transposed_steps(shape, seed, cut_axis):
    """Cut across rows it is cut across columns after, so both kinds of slices are compared."""
    weight, gradients = drawn(shape, seed)
    count = 2 if shape[cut_axis] >= 2 else 1
    plain = trajectory(weight, gradients, WITH_EVERYTHING, axis=cut_axis, count=count)
    turned = trajectory(
        weight.T.contiguous(),
        [gradient.T.contiguous() for gradient in gradients],
        WITH_EVERYTHING,
        axis=1 - cut_axis,
        count=count,
    )
    torch.testing.assert_close(plain.weight.T, turned.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.state.row, turned.state.column, rtol=1e-5, atol=0)
    torch.testing.assert_close(plain.state.column, turned.state.row, rtol=1e-5, atol=0)


@given(
    cut=cuts(),
    seed=seeds,
    threshold=st.floats(0.01, 10),
    rho=st.floats(1e-3, 1),
    scale_parameter=st.booleans(),
)
def test_no_step_is_longer_in_rms_than_the_threshold_times_alpha(
    cut, seed, threshold, rho, scale_parameter
):
    """Starting at 0, so that adding to the weight rounds nothing away."""
    _, gradients = drawn(cut.shape, seed)
    settings = dataclasses.replace(PAPER, clip_threshold=threshold, scale_parameter=scale_parameter)
    parameter = cut.of(torch.zeros(cut.shape), settings, CompiledPasses)
    gradients[2] *= 100  # a spike, so that clipping has something to do
    for count, gradient in enumerate(gradients):
        before = parameter.weight.double()
        (measures, *_) = parameter.step(gradient, beta2=1 - (count + 1) ** -0.8, rho=rho)
        length = float((parameter.weight.double() - before).square().mean().sqrt())
        longest = float(before.abs().max())
        assert length <= threshold * measures.alpha * (1 + 2e-5) + 2.0**-24 * longest


@given(cut=matrix_cuts, seed=seeds)
def test_the_first_step_of_a_gradient_of_rank_one_is_its_sign(cut, seed):
    random = torch.Generator().manual_seed(seed)
    u, v = (torch.rand(size, generator=random) + 0.1 for size in cut.shape)
    signs = torch.randn(cut.shape, generator=random).sign()
    settings = dataclasses.replace(PAPER, scale_parameter=False)
    parameter = cut.of(torch.zeros(cut.shape), settings, CompiledPasses)
    parameter.step(torch.outer(u, v) * signs, beta2=0.0, rho=1.0)
    torch.testing.assert_close(parameter.weight, -signs, rtol=2e-5, atol=0)


@given(cut=cuts(), seed=seeds, steps=st.integers(1, 30), size=st.floats(1e-3, 1e3))
def test_the_weights_of_the_moving_average_add_up_to_one(cut, seed, steps, size):
    """So squares that never change are what their average is, at the first step and ever after."""
    random = torch.Generator().manual_seed(seed)
    parameter = cut.of(torch.ones(cut.shape), PAPER, CompiledPasses)
    gradients = [size * torch.randn(cut.shape, generator=random).sign() for _ in range(steps)]
    run(parameter, gradients)
    held = held_by(parameter)
    for name in held.keys() - {"weight"}:
        expected = torch.full_like(held[name], size * size)
        torch.testing.assert_close(held[name], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_ten_times_larger_than_others_cost_no_accuracy_at_any_number_of_slices(count):
    """Where servers factor each piece by itself, this matrix shows it."""
    weight, gradients = drawn((64, 48), 3)
    for gradient in gradients:
        gradient[:32] *= 10
    whole = CutParameter(weight.double(), Axes(0, 1), PAPER)
    cut = trajectory(weight, gradients, axis=0, count=count)
    run(whole, [gradient.double() for gradient in gradients])
    change = float((whole.weight - weight.double()).square().mean().sqrt())
    assert float((cut.weight.double() - whole.weight).abs().max()) <= 1e-4 * change
