"""The compiled passes agree with the readable ones, whatever the numbers are."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tests.optim.slices import PAPER, CutParameter, any_settings, cuts, drawn, held_by, run

from adashard_server.optim.adafactor import new_state
from adashard_server.optim.compiled import CompiledPasses
from adashard_server.optim.factored import Axes
from adashard_server.optim.layout import Layout
from adashard_server.optim.passes import Passes
from adashard_server.optim.split import SliceStep

seeds = st.integers(0, 2**32 - 1)
# Around the lanes of a row, the blocks of rows and the widths of vector units.
sizes = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 17, 63, 64, 65, 131])
wide_cuts = cuts(sizes).filter(lambda cut: math.prod(cut.shape) <= 40_000)

ULP = 2.0**-24
SUM_ERROR = 100 * ULP
"""How far a float32 sum of positive numbers may be off, relatively.

Each addition is off by half a unit in the last place at most, and here no number goes through more
than 70: 64 lanes are added up in 6 levels after at most 4096 / 64 numbers each; 131 rows are 33
blocks of 3 levels. The rest is for squares, means and mixing, of a few roundings each.
"""


def assert_close(found, expected, allowed, name):
    error = float((found.double() - expected).abs().max()) if found.numel() else 0.0
    assert error <= allowed, f"{name} is off by {error:.3g}, allowed is {allowed:.3g}"


@given(cut=wide_cuts, settings=any_settings(), seed=seeds)
def test_compiled_slices_follow_float64_to_the_rounding_of_float32(cut, settings, seed):
    """A step is G / sqrt(R C / mean) over RMS(U): two roots of sums, each off by half as much."""
    weight, gradients = drawn(cut.shape, seed)
    compiled = cut.of(weight, settings, CompiledPasses)
    exact = cut.of(weight.double(), settings)
    allowed = 0.0
    for count, gradient in enumerate(gradients):
        before = exact.weight
        beta2 = 1 - (count + 1) ** -0.8
        compiled.step(gradient, beta2=beta2, rho=1e-2)
        exact.step(gradient.double(), beta2=beta2, rho=1e-2)
        longest = float((exact.weight - before).abs().max())
        allowed += 2 * SUM_ERROR * longest + 4 * ULP * float(before.abs().max())
        found = held_by(compiled)
        for name, expected in held_by(exact).items():
            is_sum = name in ("row", "column", "full")
            bound = SUM_ERROR * float(expected.max()) if is_sum else allowed
            assert_close(found[name], expected, bound, name)


@given(cut=wide_cuts, settings=any_settings(), seed=seeds)
def test_neither_shards_nor_the_order_of_calls_change_a_bit(cut, settings, seed):
    weight, gradients = drawn(cut.shape, seed)
    alone = dataclasses.replace(cut, shards=(), order=tuple(range(cut.count)))
    spread, together = (one.of(weight, settings, CompiledPasses) for one in (cut, alone))
    measures = [run(parameter, gradients) for parameter in (spread, together)]
    assert measures[0] == measures[1]
    found = held_by(spread)
    assert all(torch.equal(found[name], tensor) for name, tensor in held_by(together).items())


def test_many_columns_and_rows_keep_their_small_terms():
    """Sums go on in float64 after 4096 elements: one after another would lose a thousandth."""
    row = torch.full((1, 1 << 20), 1.1)
    assert CompiledPasses.square_sum(row) == pytest.approx(Passes.square_sum(row), rel=2e-6)


# --- numbers far from 1 ---------------------------------------------------------------------------

SETTINGS = {
    "paper": PAPER,
    "no eps1": dataclasses.replace(PAPER, eps1=0.0),
    "clamped": dataclasses.replace(PAPER, eps1=1e-7, clamp_eps=True),
    "clamped at nothing": dataclasses.replace(PAPER, eps1=0.0, clamp_eps=True),
    "momentum": dataclasses.replace(PAPER, beta1=0.9, weight_decay=0.1),
}
settings_of_all = st.sampled_from([*SETTINGS.values()])
exponents = st.integers(-45, 38)
ANY_CUT = [
    {"axes": axes, "axis": axis, "count": count}
    for axes in (Axes(0, 1), Axes(1, 0), None)
    for axis, count in ((0, 1), (0, 4), (1, 4))
]
any_cut = st.sampled_from(ANY_CUT)


def assert_finite(parameter):
    for name, tensor in held_by(parameter).items():
        assert torch.isfinite(tensor).all(), name


def of_sizes(powers, *, shape=(4, 5)):
    """A gradient of these powers of ten, repeated as needed; signs alternate."""
    count = math.prod(shape)
    numbers = list(itertools.islice(itertools.cycle(powers), count))
    signs = [1 - 2 * (at % 3 == 1) for at in range(count)]
    pairs = zip(numbers, signs, strict=True)
    return torch.tensor([sign * 10.0**power for power, sign in pairs]).reshape(shape)


@given(cut=any_cut, settings=settings_of_all, powers=st.lists(exponents, min_size=1, max_size=20))
@example(cut=ANY_CUT[1], settings=PAPER, powers=[-30, 30])
@example(cut=ANY_CUT[2], settings=PAPER, powers=[38])
@example(cut=ANY_CUT[0], settings=SETTINGS["no eps1"], powers=[-45, -20, 38])
def test_a_finite_gradient_of_any_size_gives_finite_weights_that_move_within_the_bound(
    cut, settings, powers
):
    gradient = of_sizes(powers)
    parameter = CutParameter(torch.ones(4, 5), settings=settings, passes=CompiledPasses, **cut)
    for count, of_step in enumerate((gradient, gradient.flip(0), gradient.flip(1))):
        before = parameter.weight
        measures = parameter.step(of_step, beta2=1 - (count + 1) ** -0.8, rho=1e-2)
        assert_finite(parameter)
        if not settings.weight_decay:
            length = float((parameter.weight - before).double().square().mean().sqrt())
            assert length <= measures[0].alpha * (1 + 1e-5) + ULP


@given(
    cut=any_cut,
    settings=settings_of_all,
    zero_rows=st.sets(st.integers(0, 3)),
    zero_columns=st.sets(st.integers(0, 4)),
    seed=seeds,
)
@example(cut=ANY_CUT[0], settings=PAPER, zero_rows=range(4), zero_columns=(), seed=0)
@example(cut=ANY_CUT[1], settings=SETTINGS["no eps1"], zero_rows=range(4), zero_columns=(), seed=0)
def test_zeros_do_not_move_and_do_not_stop_what_comes_later(
    cut, settings, zero_rows, zero_columns, seed
):
    weight, (gradient, later, *_) = drawn((4, 5), seed)
    settings = dataclasses.replace(settings, weight_decay=0.0)
    gradient[sorted(zero_rows)] = 0.0
    gradient[:, sorted(zero_columns)] = 0.0
    parameter = CutParameter(weight, settings=settings, passes=CompiledPasses, **cut)
    run(parameter, [torch.zeros(4, 5), gradient])
    assert torch.equal(parameter.weight[gradient == 0], weight[gradient == 0])
    parameter.step(later, beta2=0.5, rho=1e-2)
    assert_finite(parameter)
    assert (parameter.weight != weight).all()


@pytest.mark.parametrize("cut", ANY_CUT, ids=str)
@pytest.mark.parametrize("size", [1e19, 1e25, 1e37])
def test_weights_whose_squares_are_beyond_float32_step_by_their_scale(size, cut):
    weight, gradients = drawn((4, 5), 7)
    large = CutParameter(weight * size, settings=PAPER, passes=CompiledPasses, **cut)
    usual = CutParameter(weight, settings=PAPER, passes=CompiledPasses, **cut)
    run(large, gradients)
    run(usual, gradients)
    torch.testing.assert_close(large.weight / size, usual.weight)


@pytest.mark.parametrize("cut", ANY_CUT, ids=str)
def test_a_scale_that_bounds_a_huge_gradient_is_taken_into_account_before_squares(cut):
    weight, gradients = drawn((4, 5), 8)
    huge = CutParameter(weight, settings=PAPER, passes=CompiledPasses, **cut)
    usual = CutParameter(weight, settings=PAPER, passes=CompiledPasses, **cut)
    run(huge, [gradient * 2.0**120 for gradient in gradients], scale=2.0**-120)
    run(usual, gradients)
    assert torch.equal(huge.weight, usual.weight)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("passes", [Passes, CompiledPasses])
@pytest.mark.parametrize(
    ("shape", "place"),
    [
        ((8, 64), (3, 63)),  # full lanes, a block of four rows
        ((8, 70), (2, 69)),  # lanes that are left over
        ((7, 64), (6, 0)),  # rows that are left over
        ((1, 1), (0, 0)),
        ((5, 4100), (0, 4095)),  # the end of a run
        ((5, 4100), (4, 4097)),  # the run after it
        ((4, 8200), (1, 8192)),
    ],
)
def test_one_element_that_is_not_finite_shows_wherever_it_is(shape, place, passes, value):
    gradient = torch.ones(shape)
    gradient[place] = value
    for axes, axis in ((Axes(0, 1), None), (Axes(0, 1), 0), (Axes(0, 1), 1), (None, None)):
        layout = Layout(shape, shape, axes, axis)
        assert math.isnan(squared_sum(layout, gradient, passes))
        assert squared_sum(layout, torch.ones(shape), passes) == math.prod(shape)


def squared_sum(layout, gradient, passes):
    step = SliceStep(layout, PAPER, beta2=0.5, scale=1.0, passes=passes)
    state = new_state(layout.shape, layout.axes, momentum=False)
    return step.measure(gradient.view(-1), state, 0.0).gradient_squared_sum


# --- sums over workers ----------------------------------------------------------------------------


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    count=st.integers(0, 200),
    share=st.sampled_from([1.0, 0.5, 1 / 3]),
    seed=seeds,
)
@pytest.mark.parametrize("passes", [Passes, CompiledPasses])
def test_addends_of_any_format_are_added_in_place_and_the_first_replaces(
    passes, dtype, count, share, seed
):
    random = torch.Generator().manual_seed(seed)
    addends = [torch.randn(count, generator=random).to(dtype) for _ in range(2)]
    total = torch.full((count,), math.nan)
    place = total.data_ptr()
    passes.accumulate(total, addends[0], share, first=True)
    assert torch.equal(total, addends[0].float() * np.float32(share).item())
    before = total.clone()
    passes.accumulate(total, addends[1], share, first=False)
    assert total.data_ptr() == place
    assert torch.equal(total, before + addends[1].float() * np.float32(share).item())
