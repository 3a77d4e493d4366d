"""`adafactor.step` follows the golden trajectories, in float32 and far closer in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.golden.trajectories import (
    CONFIGS,
    INDEX,
    RESUME_STEP,
    RESUMED,
    STATE_KINDS,
    TENSORS,
    Config,
)

from adashard import schedule
from adashard.wire.placement import factored_axes
from adashard.wire.spec import AdafactorLayout, FactoredAxes
from adashard_server.optim import adafactor
from adashard_server.optim.factored import Axes

RULES = {"last2": FactoredAxes.LAST_TWO, "largest2": FactoredAxes.LARGEST_TWO}


def settings_of(config: Config) -> adafactor.Settings:
    meant = config.semantics
    return adafactor.Settings(
        eps1=meant["eps1"],
        eps2=meant["eps2"],
        clip_threshold=meant["d"],
        beta1=meant["beta1"],
        weight_decay=meant["wd"],
        weight_decay_mode=meant["wd_mode"],
        scale_parameter=meant["scale_parameter"],
        lr=meant["lr"] or 0.0,
        clamp_eps=meant["eps_mode"] == "torch",
    )


def axes_of(config, shape, rule=None):
    layout = AdafactorLayout(
        factored_axes=rule or RULES[config.semantics["factor"]],
        min_dim_size_to_factor=config.semantics["min_dim"],
    )
    axes = factored_axes(shape, layout)
    return axes and Axes(*axes)


def rho_of(config, step):
    meant = config.semantics
    return schedule.rho(
        step,
        lr=meant["lr"],
        relative_step=meant["rho"] != "const",
        warmup_init=meant["rho"] == "warmup",
    )


def results_of(
    config, tensor, dtype, *, settings=None, axes=None, resume=False, beta2_step_offset=0
):
    """Runs one tensor and collects what the golden file has of it: (tensor, kind, step) → found."""
    settings = settings or settings_of(config)
    weight = config.start(tensor).to(dtype)
    axes = axes or axes_of(config, weight.shape)
    state = adafactor.new_state(
        weight.shape, axes, momentum=settings.beta1 is not None, dtype=dtype
    )
    first = 1
    if resume:
        first = RESUME_STEP + 1
        weight, state = resumed(config, tensor, dtype)
    results = {}
    for step in range(first, config.last_step + 1):
        adafactor.step(
            weight,
            config.gradient(tensor, step).to(dtype),
            state,
            axes,
            settings,
            beta2=schedule.beta2(step + beta2_step_offset, -config.semantics["c"]),
            rho=rho_of(config, step),
        )
        weight = config.rounded(weight)
        for kind in config.kinds(tensor, step):
            found = weight if kind == "x" else getattr(state, STATE_KINDS[kind])
            results[tensor, kind, step] = found.clone()
    return results


def resumed(config, tensor, dtype):
    """Weight and state as they are stored in the middle of a trajectory."""

    def stored(kind):
        found = config.expected(tensor, kind, RESUME_STEP)
        return None if found is None else found.to(dtype)

    kinds = {name: stored(kind) for kind, name in STATE_KINDS.items()}
    return stored("x"), adafactor.State(**kinds)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_saved_weight_and_state_is_reached_in_float32(name):
    config = CONFIGS[name]
    for tensor in TENSORS:
        results = results_of(config, tensor, torch.float32)
        assert {step for _, kind, step in results if kind == "x"} >= set(config.saved_steps)
        assert config.differences(results) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_saved_weight_and_state_is_reached_to_rounding_in_float64(name):
    config = CONFIGS[name]
    for tensor in TENSORS:
        for key, found in results_of(config, tensor, torch.float64).items():
            standard = config.expected(*key)
            torch.testing.assert_close(found, standard, rtol=1e-10, atol=0, msg=str(key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", RESUMED)
def test_a_trajectory_goes_on_from_its_stored_state(name, dtype):
    config = CONFIGS[name]
    for tensor in TENSORS:
        results = results_of(config, tensor, dtype, resume=True)
        assert (tensor, "x", config.last_step) in results
        assert config.differences(results) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_the_state_has_the_kinds_and_shapes_that_the_files_have(name):
    config = CONFIGS[name]
    for tensor in TENSORS:
        results = results_of(config, tensor, torch.float32)
        last = {kind: found for (_, kind, step), found in results.items() if step == 25}
        held = {STATE_KINDS[kind] for kind in last if kind != "x"}
        if held:  # some files hold weights only
            axes = axes_of(config, last["x"].shape)
            momentum = config.semantics["beta1"] is not None
            expected = {"full"} if axes is None else {"row", "column"}
            assert held == expected | ({"momentum"} if momentum else set())


PAPER = settings_of(CONFIGS["paper_default"])
MISTAKES = {
    "beta2 uses t+1": {"beta2_step_offset": 1},
    "no clipping": {"settings": dataclasses.replace(PAPER, clip_threshold=float("inf"))},
    "parameter scale without eps2": {"settings": dataclasses.replace(PAPER, eps2=0.0)},
    "torch eps default": {
        "settings": dataclasses.replace(PAPER, eps1=torch.finfo(torch.float32).eps, clamp_eps=True)
    },
    "factor two largest axes": {},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_mistake_is_seen_in_the_tensors_that_it_concerns(mistake):
    config = CONFIGS["paper_default"]
    off = set()
    for tensor in TENSORS:
        options = dict(MISTAKES[mistake])
        if mistake == "factor two largest axes":
            options["axes"] = axes_of(config, config.start(tensor).shape, FactoredAxes.LARGEST_TWO)
        results = results_of(config, tensor, torch.float32, **options)
        weights = {key: found for key, found in results.items() if key[1] == "x"}
        if config.differences(weights):
            off.add(tensor)
    assert off == set(INDEX["mutations"][mistake]["tensors_out_of_tolerance"])
