"""`adafactor.step` computes what transformers, torch and optax compute, whatever the settings.

The libraries run in float64. In float64 ours must agree to rounding; in float32 it must be as
close as float32 can be, which torch's own float32 norm is not for large tensors. What optax
computes is recorded here, since it brings a second framework.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from adashard import schedule
from adashard.algorithms import adafactor_step, layout, schedules
from adashard.knobs import resolve
from adashard.wire.placement import factored_axes
from adashard_server.optim import adafactor
from adashard_server.optim.factored import Axes

STEPS = 5

shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)
seeds = st.integers(0, 2**32 - 1)
gradient_scales = st.sampled_from([0.0, 1e-8, 1e-4, 1.0, 1e4])
rates = st.floats(1e-4, 0.5)


@dataclasses.dataclass
class Problem:
    """A weight and gradients; some elements, and one whole step, have a gradient of zero."""

    weight: torch.Tensor
    gradients: list[torch.Tensor]


@st.composite
def problems(draw):
    shape, random = draw(shapes), torch.Generator().manual_seed(draw(seeds))

    def values(scale):
        # float32 values, so that both formats begin with the same numbers
        return (scale * torch.randn(shape, generator=random)).double()

    weight = values(draw(st.sampled_from([0.0, 1e-5, 0.05, 1.0])))
    gradients = [values(draw(gradient_scales)) for _ in range(STEPS)]
    for gradient in gradients:
        gradient[torch.rand(shape, generator=random) < 0.1] = 0.0
    return Problem(weight, gradients)


def by_library(optimizer_class, problem, **knobs):
    """The weights that a library's optimizer reaches in float64, step by step."""
    parameter = torch.nn.Parameter(problem.weight.clone())
    optimizer = optimizer_class([parameter], **knobs)
    weights = []
    for gradient in problem.gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        weights.append(parameter.detach().clone())
    return weights


def by_us(problem, settings, *, decay_rate, dtype=torch.float64, **rho_options):
    weight = problem.weight.to(dtype, copy=True)
    axes = Axes(weight.ndim - 2, weight.ndim - 1) if weight.ndim > 1 else None
    momentum = settings.beta1 is not None
    state = adafactor.new_state(weight.shape, axes, momentum=momentum, dtype=dtype)
    weights = []
    for count, gradient in enumerate(problem.gradients, start=1):
        adafactor.step(
            weight,
            gradient.to(dtype),
            state,
            axes,
            settings,
            beta2=schedule.beta2(count, decay_rate),
            rho=schedule.rho(count, **rho_options),
        )
        weights.append(weight.clone())
    return weights


def by_semantics(problem, semantics, **asked):
    """The weights of the settings that knobs resolve to, in float64, step by step."""
    settings = resolve(asked, semantics)
    weight = problem.weight.clone()
    chosen = factored_axes(weight.shape, layout(settings))
    axes = None if chosen is None else Axes(*chosen)
    momentum = settings["beta1"] is not None
    state = adafactor.new_state(weight.shape, axes, momentum=momentum, dtype=weight.dtype)
    weights = []
    for scalars, gradient in zip(
        schedules(settings, range(1, len(problem.gradients) + 1)), problem.gradients, strict=True
    ):
        adafactor.step(
            weight,
            gradient,
            state,
            axes,
            reference_settings(settings),
            beta2=scalars.beta2,
            rho=scalars.rho,
        )
        weights.append(weight.clone())
    return weights


def reference_settings(settings):
    """Settings of a param group as the reference takes them."""
    step = adafactor_step(settings)
    return adafactor.Settings(
        eps1=step.eps1,
        eps2=step.eps2,
        clip_threshold=step.clip_threshold,
        beta1=settings["beta1"],
        weight_decay=step.weight_decay,
        weight_decay_mode=settings["weight_decay_mode"],
        scale_parameter=step.scale_parameter,
        lr=step.lr,
        clamp_eps=settings["eps_placement"] == "clamped",
    )


def assert_same(ours, theirs, start):
    """In float32 as the goldens have it, with sizes those of the whole way and not of its end."""
    largest = change = 0.0
    for count, (found, standard) in enumerate(zip(ours, theirs, strict=True), start=1):
        if found.dtype == torch.float64:
            torch.testing.assert_close(found, standard, rtol=1e-9, atol=1e-15)
        else:
            largest = max(largest, standard.abs().max().item())
            change = max(change, (standard - start).square().mean().sqrt().item())
            allowed = 3e-5 * change + 4 * count * 2**-24 * largest
            assert (found.double() - standard).abs().max().item() <= allowed


@given(
    problem=problems(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    lr=rates,
    eps=st.tuples(st.sampled_from([1e-30, 1e-20]), st.sampled_from([1e-3, 1e-6])),
    clip_threshold=st.floats(0.1, 10),
    decay_rate=st.floats(-1, -0.3),
    beta1=st.none() | st.floats(0, 0.99),
    weight_decay=st.just(0.0) | rates,
    scale_parameter=st.booleans(),
    step_size=st.sampled_from(["lr", "relative", "warmup"]),
)
def test_every_setting_of_transformers_gives_its_weights(
    problem,
    dtype,
    lr,
    eps,
    clip_threshold,
    decay_rate,
    beta1,
    weight_decay,
    scale_parameter,
    step_size,
):
    rho_options = {
        "lr": lr if step_size == "lr" else None,
        "relative_step": step_size != "lr",
        "warmup_init": step_size == "warmup",
    }
    theirs = by_library(
        transformers.Adafactor,
        problem,
        eps=eps,
        clip_threshold=clip_threshold,
        decay_rate=decay_rate,
        beta1=beta1,
        weight_decay=weight_decay,
        scale_parameter=scale_parameter,
        **rho_options,
    )
    settings = adafactor.Settings(
        eps1=eps[0],
        eps2=eps[1],
        clip_threshold=clip_threshold,
        beta1=beta1,
        weight_decay=weight_decay,
        weight_decay_mode="alpha",
        scale_parameter=scale_parameter,
        lr=0.0,
        clamp_eps=False,
    )
    ours = by_us(problem, settings, decay_rate=decay_rate, dtype=dtype, **rho_options)
    assert_same(ours, theirs, problem.weight)


@given(
    problem=problems(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    lr=rates,
    eps=st.tuples(
        st.sampled_from([1e-15, torch.finfo(torch.float32).eps, 1e-3, 1.0]),
        st.sampled_from([1e-3, 1e-6]),
    ),
    clip_threshold=st.floats(1, 10),
    decay_rate=st.floats(-1, -0.3),
    weight_decay=st.just(0.0) | rates,
)
def test_every_setting_of_torch_gives_its_weights(
    problem, dtype, lr, eps, clip_threshold, decay_rate, weight_decay
):
    theirs = by_library(
        torch.optim.Adafactor,
        problem,
        lr=lr,
        beta2_decay=decay_rate,
        eps=eps,
        d=clip_threshold,
        weight_decay=weight_decay,
    )
    settings = adafactor.Settings(
        eps1=eps[0],
        eps2=eps[1],
        clip_threshold=clip_threshold,
        beta1=None,
        weight_decay=weight_decay,
        weight_decay_mode="lr",
        scale_parameter=True,
        lr=lr,
        clamp_eps=True,
    )
    ours = by_us(
        problem,
        settings,
        decay_rate=decay_rate,
        dtype=dtype,
        lr=lr,
        relative_step=True,
        warmup_init=False,
    )
    assert_same(ours, theirs, problem.weight)


@pytest.mark.parametrize("library", [transformers.Adafactor, torch.optim.Adafactor])
def test_defaults_of_both_libraries_differ_in_the_eps_of_small_gradients_only(library):
    """Keeps the comparison honest: the placements of eps1 are told apart by these tests."""
    shape = (4, 5)
    random = torch.Generator().manual_seed(1)
    gradients = [1e-6 * torch.randn(shape, generator=random).double() for _ in range(STEPS)]
    problem = Problem(torch.ones(shape).double(), gradients)
    paper = adafactor.Settings(
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
    eps1 = torch.finfo(torch.float32).eps
    clamped = dataclasses.replace(paper, eps1=eps1, clamp_eps=True)
    options = {"lr": None, "relative_step": True, "warmup_init": False}
    by_paper = by_us(problem, paper, decay_rate=-0.8, **options)[-1]
    by_clamping = by_us(problem, clamped, decay_rate=-0.8, **options)[-1]
    knobs = {} if library is transformers.Adafactor else {"eps": (eps1, 1e-3)}
    theirs = by_library(library, problem, **knobs)[-1]
    same, other = by_paper, by_clamping
    if library is torch.optim.Adafactor:
        same, other = other, same
    torch.testing.assert_close(same, theirs)
    assert (other - theirs).abs().max() > 1e-3


# --- what is left to the semantics ----------------------------------------------------------------


@given(problem=problems(), weight_decay=st.just(0.0) | rates, beta1=st.none() | st.floats(0, 0.99))
def test_the_paper_by_default_is_transformers_by_default(problem, weight_decay, beta1):
    asked = {"weight_decay": weight_decay, "beta1": beta1}
    ours = by_semantics(problem, "paper", **asked)
    assert_same(ours, by_library(transformers.Adafactor, problem, **asked), problem.weight)


@given(
    problem=problems(),
    lr=st.none() | rates,
    weight_decay=st.just(0.0) | rates,
    beta1=st.none() | st.floats(0, 0.99),
)
def test_transformers_trainer_is_what_its_trainer_builds(problem, lr, weight_decay, beta1):
    asked = {"weight_decay": weight_decay, "beta1": beta1}
    theirs = by_library(
        transformers.Adafactor,
        problem,
        lr=5e-5 if lr is None else lr,
        scale_parameter=False,
        relative_step=False,
        **asked,
    )
    ours = by_semantics(problem, "transformers-trainer", lr=lr, **asked)
    assert_same(ours, theirs, problem.weight)


@given(problem=problems(), weight_decay=st.just(0.0) | rates)
def test_torch_by_default_is_torch_by_default(problem, weight_decay):
    # left out, eps1 is that of the parameter's dtype, which here is float64 for exactness alone
    eps = (torch.finfo(torch.float32).eps, 1e-3)
    theirs = by_library(torch.optim.Adafactor, problem, weight_decay=weight_decay, eps=eps)
    assert_same(by_semantics(problem, "torch", weight_decay=weight_decay), theirs, problem.weight)


# optax 0.2.8 and jax 0.10.2 in float64, three steps from `waves`: the second and the last element,
# and the root of the mean square. For each: knobs, and the numbers for each shape.
BY_OPTAX = {
    "adafactor()": (
        {},
        {
            (130, 2, 128): (0.2865383465, -0.2238376234, 0.1987431473),
            (127, 140): (0.2903595364, 0.01848988237, 0.1801011546),
            (3,): (0.001867952157, 1.816998546e-06, 0.002356960735),
        },
    ),
    "adafactor(lambda count: minimum(1e-2, (count + 1) ** -0.5))": (
        {"relative_step": True},
        {
            (130, 2, 128): (0.08501429992, -0.01253786784, 0.07071735084),
            (127, 140): (0.08504011749, -0.06644053359, 0.07071584279),
            (3,): (9.573268607e-05, 9.630451634e-05, 8.039573409e-05),
        },
    ),
    "adafactor(0.1, decay_rate=0.6, clipping_threshold=0.5, momentum=0.5, "
    "weight_decay_rate=0.1, eps=1e-2)": (
        {
            "lr": 0.1,
            "decay_rate": -0.6,
            "clip_threshold": 0.5,
            "beta1": 0.5,
            "weight_decay": 0.1,
            "eps": (1e-2, None),
        },
        {
            (130, 2, 128): (0.06262789336, -0.01342746899, 0.0516739933),
            (127, 140): (0.06260179596, -0.04998163521, 0.05165561598),
            (3,): (8.8471607e-05, 0.0001002589302, 9.704521592e-05),
        },
    ),
    "adafactor(0.01, min_dim_size_to_factor=129, multiply_by_parameter_scale=False, "
    "clipping_threshold=None, momentum=0.9, weight_decay_rate=0.02)": (
        {
            "lr": 0.01,
            "min_dim_size_to_factor": 129,
            "scale_parameter": False,
            "clip_threshold": math.inf,
            "beta1": 0.9,
            "weight_decay": 0.02,
        },
        {
            (130, 2, 128): (0.0802025858, -0.0157234773, 0.06661458882),
            (127, 140): (0.0802025858, -0.06411263363, 0.06662759604),
            (3,): (0.001083208458, 0.002363516252, 0.003897786225),
        },
    ),
}


def waves(shape):
    """A weight and growing gradients, for formats and frameworks alike; small ones of vectors."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    weight = (1e-4 if len(shape) == 1 else 0.1) * torch.sin(index)
    gradients = [count * torch.cos(count * index * index) for count in range(1, 4)]
    return Problem(weight.reshape(shape), [gradient.reshape(shape) for gradient in gradients])


@pytest.mark.parametrize("call", BY_OPTAX)
def test_optax_is_what_optax_computes_by_default_and_with_every_argument(call):
    asked, expected = BY_OPTAX[call]
    for shape, numbers in expected.items():
        weight = by_semantics(waves(shape), "optax", **asked)[-1].flatten()
        found = (weight[1].item(), weight[-1].item(), weight.square().mean().sqrt().item())
        # optax computes beta2 in float32 whatever the parameters are
        assert found == pytest.approx(numbers, rel=1e-6, abs=1e-9)
