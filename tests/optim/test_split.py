"""Slices of a parameter take the step that the whole parameter would take."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.golden.trajectories import CONFIGS, RESUME_STEP, RESUMED, STATE_KINDS, TENSORS
from tests.optim.slices import (
    PAPER,
    CutParameter,
    WholeParameter,
    any_settings,
    cuts,
    drawn,
    held_by,
    run,
)
from tests.optim.test_golden import axes_of, resumed, rho_of, settings_of

from adashard import schedule
from adashard_server.optim.compiled import CompiledPasses
from adashard_server.optim.factored import Axes
from adashard_server.optim.layout import Layout
from adashard_server.optim.passes import Passes
from adashard_server.optim.split import SliceStep

seeds = st.integers(0, 2**32 - 1)


def assert_same_to_rounding(cut, whole):
    """In float64, where nothing but the order of operations differs."""
    found = held_by(cut)
    for name, expected in held_by(whole).items():
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-11 * scale, msg=name)


# --- the whole, whichever way it is cut -----------------------------------------------------------


@given(cut=cuts(), settings=any_settings(), seed=seeds, scale=st.sampled_from([1.0, 1 / 3]))
def test_slices_cut_in_any_way_take_the_step_of_the_whole(cut, settings, seed, scale):
    weight, gradients = drawn(cut.shape, seed, dtype=torch.float64)
    sliced, whole = cut.of(weight, settings), WholeParameter(weight, cut.axes, settings)
    assert_same_to_rounding(sliced, whole)
    found = run(sliced, gradients, scale=scale)
    expected = run(whole, gradients, scale=scale)
    assert_same_to_rounding(sliced, whole)
    for one, other in zip(found, expected, strict=True):
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), rel=1e-11)


@given(
    cut=cuts(st.integers(8, 12), axis_counts=(2, 3), factored=True, least_count=2),
    exponent=st.integers(-5, 0),
    threshold=st.sampled_from([0.1, 1.0, float("inf")]),
    seed=seeds,
)
def test_a_bound_that_binds_in_some_slices_only_is_that_of_the_whole(
    cut, exponent, threshold, seed
):
    """Along the cut the gradient falls from 1 to 1e-5, so some slices have nothing to bound."""
    settings = dataclasses.replace(
        PAPER, eps1=10.0**exponent, clamp_eps=True, clip_threshold=threshold
    )
    weight, gradients = drawn(cut.shape, seed, dtype=torch.float64)
    fall = torch.logspace(0, -5, cut.shape[cut.axis], dtype=torch.float64)
    along = [-1 if axis == cut.axis else 1 for axis in range(len(cut.shape))]
    sliced, whole = cut.of(weight, settings), WholeParameter(weight, cut.axes, settings)
    for gradient in gradients:
        falling = gradient * fall.view(along)
        found = sliced.step(falling, beta2=0.5, rho=1e-2)
        (expected,) = whole.step(falling, beta2=0.5, rho=1e-2)
        for one in found:
            assert dataclasses.astuple(one) == pytest.approx(
                dataclasses.astuple(expected), rel=1e-10
            )
        assert_same_to_rounding(sliced, whole)


@given(
    cut=cuts(),
    settings=any_settings(),
    seed=seeds,
    passes=st.sampled_from([Passes, CompiledPasses]),
)
def test_all_slices_tell_the_same_of_the_step(cut, settings, seed, passes):
    weight, gradients = drawn(cut.shape, seed)
    sliced = cut.of(weight, settings, passes)
    for gradient in gradients:
        measures = sliced.step(gradient, beta2=0.5, rho=1e-2)
        assert all(one == measures[0] for one in measures)


@given(
    cut=cuts(),
    settings=any_settings(),
    seed=seeds,
    passes=st.sampled_from([Passes, CompiledPasses]),
)
def test_measuring_writes_nothing(cut, settings, seed, passes):
    weight, gradients = drawn(cut.shape, seed)
    sliced = cut.of(weight, settings, passes)
    run(sliced, gradients[:-1])
    before = held_by(sliced)
    steps = [
        SliceStep(p.layout, settings, beta2=0.5, scale=1.0, passes=passes) for p in sliced.pieces
    ]
    parts = [torch.ones_like(piece.weight) for piece in sliced.pieces]
    sliced.measured(steps, parts)
    after = held_by(sliced)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(part, torch.ones_like(part)) for part in parts)


@pytest.mark.parametrize("passes", [Passes, CompiledPasses])
@pytest.mark.parametrize("clamp_eps", [False, True])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((0,), None), ((0, 3), None), ((0, 2, 3), Axes(1, 2)), ((2, 0, 3), Axes(0, 2))],
)
def test_a_parameter_without_elements_takes_a_step_of_nothing(shape, axes, clamp_eps, passes):
    settings = dataclasses.replace(PAPER, beta1=0.9, clamp_eps=clamp_eps)
    sliced = CutParameter(torch.zeros(shape), axes, settings, passes=passes)
    (measures,) = run(sliced, [torch.zeros(shape)])
    assert measures.update_squared_sum == 0
    assert all(torch.isfinite(tensor).all() for tensor in held_by(sliced).values())


# --- what a layout says ---------------------------------------------------------------------------


@given(cut=cuts(), seed=seeds)
def test_a_tensor_goes_into_matrices_and_back(cut, seed):
    weight, _ = drawn(cut.shape, seed, steps=1)
    layout = Layout(cut.shape, cut.shape, cut.axes, None)
    matrices = layout.as_matrices(weight.view(-1))
    assert matrices.shape == layout.matrices
    assert matrices.is_contiguous()
    changed = weight.clone()
    layout.restore(2 * matrices, changed) if cut.axes else changed.mul_(2)
    shared = matrices.data_ptr() == weight.data_ptr()
    assert torch.equal(changed, weight if shared and cut.axes else 2 * weight)


def test_only_slices_along_a_factored_axis_have_a_long_factor():
    def long(axes, axis):
        return Layout((2, 3, 4), (4, 6, 8), axes, axis).long

    axes = Axes(row=1, column=2)
    assert [long(axes, axis) for axis in (None, 0, 1, 2)] == [None, None, "row", "column"]
    assert [long(None, axis) for axis in (None, 0, 1, 2)] == [None] * 4


# --- golden trajectories --------------------------------------------------------------------------


def cuttings(config, tensor):
    """The tensor of the golden files whole, in 2 slices of rows and in 4 along its last axis."""
    shape = config.start(tensor).shape
    yield {"axis": 0, "count": 1}
    for axis, count in ((0, 2), (len(shape) - 1, 4)):
        if shape and shape[axis] >= count:
            yield {"axis": axis, "count": count}


def results_of(config, tensor, cutting, *, resume=False):
    """Runs one tensor in slices; collects what the golden file has of it."""
    settings = settings_of(config)
    weight, state, first = config.start(tensor).float(), None, 1
    axes = axes_of(config, weight.shape)
    if resume:
        weight, state = resumed(config, tensor, torch.float32)
        first = RESUME_STEP + 1
    cut = CutParameter(weight, axes, settings, passes=CompiledPasses, state=state, **cutting)
    results = {}
    for step in range(first, config.last_step + 1):
        gradient, beta2 = (
            config.gradient(tensor, step).float(),
            schedule.beta2(step, -config.semantics["c"]),
        )
        cut.step(gradient, beta2=beta2, rho=rho_of(config, step))
        if config.is_bf16:
            for piece in cut.pieces:
                piece.weight = config.rounded(piece.weight)
                piece.squared_sum = CompiledPasses.square_sum(piece.weight.view(1, -1))
        kinds = config.kinds(tensor, step)
        held = held_by(cut) if kinds else {}
        for kind in kinds:
            results[tensor, kind, step] = held[STATE_KINDS.get(kind, "weight")]
    return results


@pytest.mark.parametrize("name", CONFIGS)
def test_every_golden_weight_and_state_is_reached_in_slices(name):
    config = CONFIGS[name]
    for tensor in TENSORS:
        for cutting in cuttings(config, tensor):
            results = results_of(config, tensor, cutting)
            assert (tensor, "x", config.last_step) in results
            assert config.differences(results) == [], cutting


@pytest.mark.parametrize("name", RESUMED)
def test_a_golden_trajectory_goes_on_in_slices_from_its_stored_state(name):
    config = CONFIGS[name]
    for tensor in TENSORS:
        for cutting in cuttings(config, tensor):
            results = results_of(config, tensor, cutting, resume=True)
            assert config.differences(results) == [], cutting
