"""Laws of Adafactor that hold exactly, for any weights and gradients."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adashard import schedule
from adashard_server.optim import adafactor
from adashard_server.optim.adafactor import Settings, State
from adashard_server.optim.factored import Axes

PAPER = Settings(
    eps1=1e-30,
    eps2=1e-3,
    clip_threshold=1.0,
    beta1=None,
    weight_decay=0.0,
    weight_decay_mode="alpha",
    scale_parameter=True,
    lr=0.0,
    clamp_eps=False,
)
WITH_EVERYTHING = dataclasses.replace(PAPER, beta1=0.9, weight_decay=0.1, clip_threshold=0.7)

shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)
matrices = st.tuples(st.integers(1, 6), st.integers(1, 6))
seeds = st.integers(0, 2**32 - 1)
eps1s = st.sampled_from([0.0, 1e-60, 1e-40, 1e-30, 1e-20, 1e-7, 1e-3])


def last_two(shape):
    if len(shape) < 2 or 0 in shape[-2:]:
        return None
    return Axes(len(shape) - 2, len(shape) - 1)


def random_problem(shape, seed, *, steps=4, dtype=torch.float32):
    """A weight and gradients of RMS about 1, none of them next to zero."""
    random = torch.Generator().manual_seed(seed)

    def draw():
        values = torch.randn(shape, generator=random, dtype=torch.float64)
        return (values.sign() * (values.abs() + 0.1)).to(dtype)

    return draw(), [draw() for _ in range(steps)]


def trajectory(weight, gradients, *, axes="last two", settings=PAPER, rho=1e-2):
    """Steps through all gradients; returns the weight after each step, and the state at the end."""
    weight = weight.clone()
    axes = last_two(weight.shape) if axes == "last two" else axes
    state = adafactor.new_state(
        weight.shape, axes, momentum=settings.beta1 is not None, dtype=weight.dtype
    )
    weights, measures = [], []
    for count, gradient in enumerate(gradients, start=1):
        beta2 = schedule.beta2(count, -0.8)
        measures.append(
            adafactor.step(weight, gradient, state, axes, settings, beta2=beta2, rho=rho)
        )
        weights.append(weight.clone())
    return Run(weights, state, measures)


@dataclasses.dataclass
class Run:
    weights: list[torch.Tensor]
    state: State
    measures: list[adafactor.Measures]


def tensors_of(state):
    named = {
        "row": state.row,
        "column": state.column,
        "full": state.full,
        "momentum": state.momentum,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


# --- scale ----------------------------------------------------------------------------------------


@given(shape=shapes, seed=seeds, exponent=st.integers(-20, 20))
def test_scaling_all_gradients_by_a_power_of_two_changes_no_bit_of_the_weights(
    shape, seed, exponent
):
    weight, gradients = random_problem(shape, seed)
    plain = trajectory(weight, gradients, settings=WITH_EVERYTHING)
    scaled = trajectory(weight, [g * 2.0**exponent for g in gradients], settings=WITH_EVERYTHING)
    for one, other in zip(plain.weights, scaled.weights, strict=True):
        assert torch.equal(one, other)


@given(shape=shapes, seed=seeds, factor=st.floats(0.1, 1e3))
def test_a_parameter_in_other_units_takes_the_same_steps_in_those_units(shape, seed, factor):
    """(X, G) → (k X, G / k) gives k X, as long as the parameter's scale is above eps2."""
    weight, gradients = random_problem(shape, seed, dtype=torch.float64)
    settings = dataclasses.replace(WITH_EVERYTHING, weight_decay_mode="plain")
    plain = trajectory(weight, gradients, settings=settings)
    scaled = trajectory(weight * factor, [g / factor for g in gradients], settings=settings)
    for one, other in zip(plain.weights, scaled.weights, strict=True):
        torch.testing.assert_close(one * factor, other)


@given(shape=shapes, seed=seeds, workers=st.integers(1, 4))
def test_the_sum_over_workers_takes_the_same_steps_as_the_mean(shape, seed, workers):
    weight, gradients = random_problem(shape, seed, dtype=torch.float64)
    mean = trajectory(weight, gradients)
    total = trajectory(weight, [g * workers for g in gradients])
    torch.testing.assert_close(mean.weights[-1], total.weights[-1])


# --- symmetry -------------------------------------------------------------------------------------


@given(shape=matrices, seed=seeds)
def test_permuted_rows_and_columns_take_permuted_steps(shape, seed):
    weight, gradients = random_problem(shape, seed, dtype=torch.float64)
    random = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=random) for size in shape)

    def permuted(tensor):
        return tensor[rows][:, columns]

    plain = trajectory(weight, gradients, settings=WITH_EVERYTHING)
    moved = trajectory(permuted(weight), [permuted(g) for g in gradients], settings=WITH_EVERYTHING)
    torch.testing.assert_close(permuted(plain.weights[-1]), moved.weights[-1])


@given(shape=matrices, seed=seeds)
def test_a_transposed_matrix_takes_transposed_steps(shape, seed):
    weight, gradients = random_problem(shape, seed, dtype=torch.float64)
    plain = trajectory(weight, gradients, settings=WITH_EVERYTHING)
    turned = trajectory(weight.T, [g.T for g in gradients], settings=WITH_EVERYTHING)
    torch.testing.assert_close(plain.weights[-1].T, turned.weights[-1])
    torch.testing.assert_close(plain.state.row, turned.state.column)


@given(
    shape=st.tuples(*[st.integers(1, 4)] * 4),
    seed=seeds,
    pair=st.permutations(range(4)).map(lambda axes: Axes(*axes[:2])),
)
def test_any_two_axes_are_factored_as_the_last_two_would_be(shape, seed, pair):
    weight, gradients = random_problem(shape, seed, dtype=torch.float64)

    def moved(tensor):
        return tensor.movedim(tuple(pair), (-2, -1))

    anywhere = trajectory(weight, gradients, axes=pair)
    last = trajectory(moved(weight), [moved(g) for g in gradients])
    torch.testing.assert_close(moved(anywhere.weights[-1]), last.weights[-1])


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), seed=seeds)
def test_each_matrix_of_a_batch_has_factors_of_its_own(shape, seed):
    weight, gradients = random_problem(shape, seed)
    together = trajectory(weight, gradients).state
    for index in range(shape[0]):
        alone = trajectory(weight[index], [g[index] for g in gradients]).state
        torch.testing.assert_close(together.row[index], alone.row)
        torch.testing.assert_close(together.column[index], alone.column)


@given(seed=seeds)
def test_a_batch_of_equal_matrices_steps_as_one_of_them(seed):
    """RMS(X) and RMS(U) are those of the whole tensor."""
    weight, gradients = random_problem((4, 5), seed, dtype=torch.float64)
    one = trajectory(weight, gradients)
    three = trajectory(weight.expand(3, 4, 5), [g.expand(3, 4, 5) for g in gradients])
    torch.testing.assert_close(three.weights[-1], one.weights[-1].expand(3, 4, 5))


# --- size and direction of a step -----------------------------------------------------------------


@given(
    shape=shapes,
    seed=seeds,
    threshold=st.floats(0.01, 10),
    rho=st.floats(1e-4, 1),
    scale_parameter=st.booleans(),
)
def test_no_step_is_longer_in_rms_than_the_threshold_times_alpha(
    shape, seed, threshold, rho, scale_parameter
):
    weight, gradients = random_problem(shape, seed, dtype=torch.float64)
    gradients[2] *= 100  # a spike, so that clipping has something to do
    settings = dataclasses.replace(PAPER, clip_threshold=threshold, scale_parameter=scale_parameter)
    run = trajectory(weight, gradients, settings=settings, rho=rho)
    before = [weight, *run.weights]
    for old, new, measures in zip(before, run.weights, run.measures, strict=False):
        length = (new - old).square().mean().sqrt().item()
        assert length <= threshold * measures.alpha * (1 + 1e-9)


@given(seed=seeds, rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_the_first_step_of_a_gradient_of_rank_one_is_its_sign(seed, rows, columns):
    random = torch.Generator().manual_seed(seed)
    u = torch.rand(rows, generator=random, dtype=torch.float64) + 0.1
    v = torch.rand(columns, generator=random, dtype=torch.float64) + 0.1
    signs = torch.randn(rows, columns, generator=random, dtype=torch.float64).sign()
    weight = torch.ones(rows, columns, dtype=torch.float64)
    run = trajectory(weight, [torch.outer(u, v) * signs])
    torch.testing.assert_close(run.weights[0], 1 - 1e-2 * signs)


@given(seed=seeds, shape=shapes)
def test_the_first_step_of_an_unfactored_gradient_is_its_sign(seed, shape):
    weight, gradients = random_problem(shape, seed, steps=1, dtype=torch.float64)
    settings = dataclasses.replace(PAPER, scale_parameter=False)
    run = trajectory(weight, gradients, axes=None, settings=settings)
    torch.testing.assert_close(weight - run.weights[0], 1e-2 * gradients[0].sign())


@given(length=st.integers(1, 8), seed=seeds, as_column=st.booleans())
def test_a_matrix_with_an_axis_of_one_steps_as_the_vector_that_it_is(length, seed, as_column):
    """Where V has one row or column its factors lose nothing."""
    weight, gradients = random_problem((length,), seed, dtype=torch.float64)
    axis = 1 if as_column else 0
    vector = trajectory(weight, gradients, settings=WITH_EVERYTHING)
    matrix = trajectory(
        weight.unsqueeze(axis), [g.unsqueeze(axis) for g in gradients], settings=WITH_EVERYTHING
    )
    torch.testing.assert_close(matrix.weights[-1].squeeze(axis), vector.weights[-1])


@given(shape=shapes, seed=seeds)
def test_the_measures_are_those_of_the_step(shape, seed):
    weight, gradients = random_problem(shape, seed, dtype=torch.float64)
    settings = dataclasses.replace(PAPER, clip_threshold=0.5)
    run = trajectory(weight, gradients[:1], settings=settings)
    measures = run.measures[0]
    alpha = 1e-2 * weight.square().mean().sqrt().item()
    clipped_rms = (weight - run.weights[0]).square().mean().sqrt().item() / alpha
    rms = math.sqrt(measures.update_squared_sum / weight.numel())
    assert measures.alpha == pytest.approx(alpha)
    assert measures.clip_ratio == pytest.approx(max(1, rms / 0.5))
    assert rms / measures.clip_ratio == pytest.approx(clipped_rms, rel=1e-6)


def test_the_parameter_s_scale_is_never_below_eps2_and_moves_a_weight_of_zero():
    run = trajectory(torch.zeros(3), [torch.tensor([1.0, -2.0, 3.0])])
    torch.testing.assert_close(run.weights[0], -1e-3 * 1e-2 * torch.tensor([1.0, -1.0, 1.0]))
    assert run.measures[0].alpha == pytest.approx(1e-5)


# --- decay and momentum ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("alpha", 1 - 0.1 * 2e-2), ("lr", 1 - 0.1 * 0.3), ("plain", 1 - 0.1)],
)
def test_weight_decay_is_multiplied_by_what_its_mode_says_before_the_update(mode, kept):
    settings = dataclasses.replace(PAPER, weight_decay=0.1, weight_decay_mode=mode, lr=0.3)
    weight = torch.full((4,), 2.0)
    run = trajectory(weight, [torch.zeros(4)], settings=settings)
    torch.testing.assert_close(run.weights[0], weight * kept)
    run = trajectory(weight, [torch.ones(4)], settings=settings)
    torch.testing.assert_close(run.weights[0], weight * kept - 2e-2)


@given(shape=shapes, seed=seeds, beta1=st.floats(0, 0.99))
def test_momentum_is_the_moving_average_of_scaled_updates(shape, seed, beta1):
    weight, gradients = random_problem(shape, seed, steps=1, dtype=torch.float64)
    update = weight - trajectory(weight, gradients).weights[0]
    settings = dataclasses.replace(PAPER, beta1=beta1)
    run = trajectory(weight, gradients, settings=settings)
    torch.testing.assert_close(run.state.momentum, (1 - beta1) * update)
    torch.testing.assert_close(weight - run.weights[0], (1 - beta1) * update)
    zero = torch.zeros(shape, dtype=torch.float64)
    coasting = trajectory(weight, [*gradients, zero], settings=settings)
    torch.testing.assert_close(coasting.state.momentum, beta1 * (1 - beta1) * update)


# --- nothing, next to nothing, and very much ------------------------------------------------------


@given(shape=shapes, eps1=eps1s, clamp_eps=st.booleans(), seed=seeds, momentum=st.booleans())
def test_a_gradient_of_zero_moves_nothing_and_gives_no_nan(shape, eps1, clamp_eps, seed, momentum):
    settings = dataclasses.replace(
        PAPER, eps1=eps1, clamp_eps=clamp_eps, beta1=0.9 if momentum else None
    )
    weight, gradients = random_problem(shape, seed, steps=1)
    zero = torch.zeros(shape)
    run = trajectory(weight, [zero, zero], settings=settings)
    assert torch.equal(run.weights[-1], weight)
    woken = trajectory(weight, [zero, *gradients, zero], settings=settings)
    assert torch.isfinite(woken.weights[-1]).all()
    assert not torch.equal(woken.weights[-1], weight)
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(woken.state).values())


@given(
    eps1=eps1s,
    clamp_eps=st.booleans(),
    exponents=st.lists(st.integers(-45, 38), min_size=12, max_size=12),
    factored=st.booleans(),
)
def test_gradients_of_any_size_give_finite_weights(eps1, clamp_eps, exponents, factored):
    settings = dataclasses.replace(PAPER, eps1=eps1, clamp_eps=clamp_eps)
    gradient = torch.tensor([10.0**exponent for exponent in exponents]).reshape(3, 4)
    gradient[1] = 0.0
    axes = Axes(0, 1) if factored else None
    run = trajectory(torch.ones(3, 4), [gradient, gradient.flip(0)], axes=axes, settings=settings)
    assert torch.isfinite(run.weights[-1]).all()
    assert (run.weights[-1] - 1).square().mean().sqrt() <= 2 * 1.1e-2


def test_clamping_bounds_the_root_of_the_moment_from_below_by_eps1():
    settings = dataclasses.replace(
        PAPER, eps1=1e-3, clamp_eps=True, clip_threshold=math.inf, scale_parameter=False
    )
    gradient = torch.tensor([1e-5, -1.0])
    run = trajectory(torch.zeros(2), [gradient], settings=settings)
    torch.testing.assert_close(run.weights[0], -1e-2 * torch.tensor([1e-2, -1.0]))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 2, 3)])
def test_a_parameter_without_elements_takes_a_step_of_nothing(shape):
    run = trajectory(torch.zeros(shape), [torch.zeros(shape)], settings=WITH_EVERYTHING)
    assert run.measures[0].update_squared_sum == 0
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(run.state).values())


# --- memory ---------------------------------------------------------------------------------------


@given(shape=shapes, seed=seeds, momentum=st.booleans())
def test_a_step_writes_weight_and_state_in_place_and_leaves_the_gradient_alone(
    shape, seed, momentum
):
    weight, (gradient, *_) = random_problem(shape, seed)
    axes = last_two(shape)
    state = adafactor.new_state(shape, axes, momentum=momentum)
    settings = dataclasses.replace(PAPER, beta1=0.9 if momentum else None)
    held = {"weight": weight, **tensors_of(state)}
    places = {name: tensor.data_ptr() for name, tensor in held.items()}
    before, original = weight.clone(), gradient.clone()
    adafactor.step(weight, gradient, state, axes, settings, beta2=0.0, rho=1e-2)
    after = {"weight": weight, **tensors_of(state)}
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == places
    assert all(after[name] is tensor for name, tensor in held.items())
    assert torch.equal(gradient, original)
    assert not torch.equal(weight, before)


@given(shape=shapes, momentum=st.booleans(), data=st.data())
def test_state_bytes_from_shapes_are_those_that_a_state_holds(shape, momentum, data):
    pairs = itertools.combinations(range(len(shape)), 2)
    axes = data.draw(st.sampled_from([None, *itertools.starmap(Axes, pairs)]))
    expected = adafactor.state_bytes(shape, axes, momentum=momentum)
    state = adafactor.new_state(shape, axes, momentum=momentum)
    assert state.bytes_by_kind() == expected
    assert set(expected) == ({"vector"} if axes is None else {"row", "column"}) | (
        {"momentum"} if momentum else set()
    )


def test_the_state_of_a_matrix_grows_with_its_edges_and_not_with_its_area():
    assert adafactor.state_bytes((1024, 65536), Axes(0, 1), momentum=False) == {
        "row": 4 * 1024,
        "column": 4 * 65536,
    }


def test_the_state_is_float32_unless_another_format_is_asked_for():
    state = adafactor.new_state((3, 4), Axes(0, 1), momentum=True)
    assert {tensor.dtype for tensor in tensors_of(state).values()} == {torch.float32}
    state = adafactor.new_state((3, 4), None, momentum=True, dtype=torch.float64)
    assert {tensor.dtype for tensor in tensors_of(state).values()} == {torch.float64}


def test_a_gradient_of_another_shape_or_format_is_a_programming_mistake():
    state = adafactor.new_state((3,), None, momentum=False)
    for gradient in (torch.ones(4), torch.ones(3, dtype=torch.bfloat16)):
        with pytest.raises(AssertionError):
            adafactor.step(torch.ones(3), gradient, state, None, PAPER, beta2=0.0, rho=1e-2)


def test_beta1_without_momentum_in_the_state_is_a_programming_mistake():
    state = adafactor.new_state((3,), None, momentum=False)
    settings = dataclasses.replace(PAPER, beta1=0.9)
    with pytest.raises(AssertionError, match="beta1"):
        adafactor.step(torch.ones(3), torch.ones(3), state, None, settings, beta2=0.0, rho=1e-2)
