"""Adafactor's knobs: what they mean, what is refused, and what travels with a push."""

from __future__ import annotations

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tests.golden.trajectories import CONFIGS, TENSORS

from adashard import Adafactor
from adashard.algorithms import KNOBS, SEMANTICS, layout, resolve, settings_now
from adashard.wire.errors import InvalidSettings
from adashard.wire.messages import AdafactorStep
from adashard.wire.spec import AdafactorLayout, EpsPlacement, FactoredAxes, Group, WeightDecayMode
from adashard_server.optim import adafactor
from adashard_server.optim.factored import factored_axes

FLOAT32_EPS = torch.finfo(torch.float32).eps


def parameter(*shape):
    return torch.nn.Parameter(torch.ones(shape or (2, 3)))


def only_group(**knobs):
    optimizer = Adafactor([parameter()], **knobs)
    return optimizer, optimizer.param_groups[0]


def refused(**knobs):
    """The message of the refusal."""
    with pytest.raises(InvalidSettings) as caught:
        Adafactor([parameter()], **knobs)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


# --- what a knob means that is left out -----------------------------------------------------------


def test_the_signature_is_transformers_own_and_then_keywords_only():
    ours = list(inspect.signature(Adafactor).parameters.values())
    theirs = list(inspect.signature(transformers.Adafactor).parameters)
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == theirs
    assert {p.kind for p in ours[len(positional) :]} == {inspect.Parameter.KEYWORD_ONLY}
    assert {p.default for p in ours if p.name in KNOBS} == {None}


def test_the_paper_s_settings_are_transformers_defaults():
    _, group = only_group()
    (theirs,) = transformers.Adafactor([parameter()]).param_groups
    shared = theirs.keys() - {"params"}
    assert {name: group[name] for name in shared} == {name: theirs[name] for name in shared}
    assert group["factored_axes"] == "last_two"
    assert group["min_dim_size_to_factor"] == 1
    assert group["weight_decay_mode"] == "alpha"


def test_torch_s_settings_are_the_defaults_of_torch():
    _, group = only_group(semantics="torch")
    (theirs,) = torch.optim.Adafactor([parameter()]).param_groups
    assert group["lr"] == theirs["lr"]
    assert group["decay_rate"] == theirs["beta2_decay"]
    assert group["clip_threshold"] == theirs["d"]
    assert group["weight_decay"] == theirs["weight_decay"]
    assert group["eps"] == (FLOAT32_EPS, theirs["eps"][1])
    assert (group["relative_step"], group["scale_parameter"]) == (True, True)
    assert group["weight_decay_mode"] == "lr"
    assert group["beta1"] is None


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_an_eps_of_which_one_is_left_out_takes_that_one_from_the_semantics(semantics):
    eps1, eps2 = SEMANTICS[semantics]["eps"]
    assert resolve({"eps": (None, 0.5)}, semantics)["eps"] == (eps1, 0.5)
    assert resolve({"eps": [0.5, None]}, semantics)["eps"] == (0.5, eps2)


numbers = st.floats(0, 1e6) | st.integers(0, 10)
all_knobs = st.fixed_dictionaries(
    {
        "lr": st.none() | numbers,
        "eps": st.none() | st.tuples(st.none() | numbers, st.none() | numbers),
        "clip_threshold": st.none() | st.floats(0, exclude_min=True, allow_nan=False),
        "decay_rate": st.none() | st.floats(-2, 0),
        "beta1": st.none() | st.floats(0, 1, exclude_max=True),
        "weight_decay": st.none() | numbers,
        "scale_parameter": st.none() | st.booleans(),
        "relative_step": st.none() | st.booleans(),
        "warmup_init": st.none() | st.booleans(),
        "factored_axes": st.none() | st.sampled_from(["last_two", "largest_two"]),
        "min_dim_size_to_factor": st.none() | st.integers(1, 128),
        "weight_decay_mode": st.none() | st.sampled_from(["alpha", "lr", "plain"]),
    }
)


@given(knobs=all_knobs, semantics=st.sampled_from(list(SEMANTICS)))
def test_knobs_resolve_to_every_setting_or_are_refused_and_settings_to_themselves(knobs, semantics):
    try:
        settings = resolve(knobs, semantics)
    except InvalidSettings as refusal:
        if "contradict each other" not in str(refusal):
            raise
        return
    assert tuple(settings) == KNOBS
    assert resolve(settings, semantics) == settings
    for name, knob in knobs.items():
        if knob is not None and name != "eps":
            assert settings[name] == knob
    assert all(eps is None or eps in settings["eps"] for eps in knobs["eps"] or ())


@given(knobs=all_knobs, semantics=st.sampled_from(list(SEMANTICS)))
def test_what_resolves_travels_and_a_shard_can_take_a_step_with_it(knobs, semantics):
    try:
        optimizer, group = only_group(**knobs, semantics=semantics)
    except InvalidSettings:
        return
    step = optimizer._group_step(group, [1])
    settings = shard_settings(step.adafactor, optimizer._layout(group).adafactor)
    weight = torch.ones(3)
    state = adafactor.new_state((3,), None, momentum=settings.beta1 is not None)
    (scalars,) = step.schedules
    adafactor.step(
        weight, torch.ones(3), state, None, settings, beta2=scalars.beta2, rho=scalars.rho
    )
    assert torch.isfinite(weight).all()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "relative_step", "warmup_init"),
    list(itertools.product([None, 1e-3, 0.0], [True, False], [True, False])),
)
def test_whatever_transformers_refuses_is_refused_and_a_step_without_size_too(
    lr, relative_step, warmup_init
):
    knobs = {"lr": lr, "relative_step": relative_step, "warmup_init": warmup_init}
    try:
        transformers.Adafactor([parameter()], **knobs)
        refused_there = False
    except ValueError:
        refused_there = True
    if refused_there or (lr is None and not relative_step):
        refused(**knobs)
    else:
        Adafactor([parameter()], **knobs)


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"lr": 0.01}, ["lr=0.01", "relative_step=True", "semantics='paper'"]),
        ({"warmup_init": True, "relative_step": False, "lr": 0.01}, ["relative_step=False"]),
        ({"relative_step": False}, ["relative_step=False", "lr=None"]),
        ({"warmup_init": True, "semantics": "torch"}, ["warmup_init=True", "semantics='torch'"]),
        ({"weight_decay_mode": "lr"}, ["weight_decay_mode='lr'", "lr=None"]),
    ],
)
def test_settings_that_contradict_each_other_are_both_named(knobs, named):
    message = refused(**knobs)
    assert all(words in message for words in named)
    assert "contradict each other" in message


nan, inf = math.nan, math.inf


@pytest.mark.parametrize(
    ("knob", "values"),
    [
        ("lr", [-1e-3, nan, inf, "1e-3", True, torch.ones(2)]),
        ("eps", [1e-30, (1e-30,), (1, 2, 3), (-1.0, 1e-3), (1e-30, nan), ("a", 1), "ab"]),
        ("clip_threshold", [0, 0.0, -1.0, nan, "off", False]),
        ("decay_rate", [0.8, nan, -inf, "-0.8"]),
        ("beta1", [-0.1, 1.0, 1, nan, "0.9", (0.9, 0.999)]),
        ("weight_decay", [-0.1, nan, inf, "0"]),
        ("scale_parameter", [1, 0.0, "no"]),
        ("relative_step", [1, "no"]),
        ("warmup_init", [0, "no"]),
        ("factored_axes", ["last2", "LAST_TWO", 1, (0, 1)]),
        ("min_dim_size_to_factor", [0, -1, 1.5, True, "128"]),
        ("weight_decay_mode", ["decoupled", 0]),
        ("semantics", ["hf", None, 1]),
        ("nonfinite", ["ignore", None]),
        ("on_existing", ["overwrite", None]),
    ],
)
def test_a_value_without_meaning_is_named(knob, values):
    for value in values:
        message = refused(**{"semantics": "torch", knob: value})
        assert f"{knob}={value!r}" in message


@pytest.mark.parametrize(
    ("knob", "choices"),
    [
        ("semantics", ["paper", "torch"]),
        ("factored_axes", ["last_two", "largest_two"]),
        ("weight_decay_mode", ["alpha", "lr", "plain"]),
        ("nonfinite", ["reject", "skip"]),
        ("on_existing", ["resume", "replace", "error"]),
    ],
)
def test_a_choice_that_does_not_exist_shows_those_that_do(knob, choices):
    message = refused(**{knob: "something else"})
    assert all(repr(choice) in message for choice in choices)


@pytest.mark.parametrize("knob", ["eps", "clip_threshold", "beta1", "weight_decay", "decay_rate"])
def test_numbers_of_numpy_are_numbers(knob):
    value = {"eps": (np.float32(0.5), np.float64(0.5)), "decay_rate": np.float32(-0.5)}
    settings = resolve({knob: value.get(knob, np.float64(0.5))}, "paper")
    found = settings[knob] if knob == "eps" else (settings[knob],)
    assert {type(number) for number in found} == {float}
    assert {abs(number) for number in found} == {0.5}


# --- param groups ---------------------------------------------------------------------------------


def test_a_group_may_have_knobs_of_its_own_and_takes_the_rest_from_the_optimizer():
    optimizer = Adafactor(
        [
            {"params": [parameter()], "weight_decay": 0.5},
            {"params": [parameter()], "relative_step": False, "lr": 0.25, "eps": (None, 1.0)},
        ],
        weight_decay=0.1,
        clip_threshold=inf,
    )
    first, second = optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.5, 0.1)
    assert (first["lr"], second["lr"]) == (None, 0.25)
    assert (first["eps"], second["eps"]) == ((1e-30, 1e-3), (1e-30, 1.0))
    assert {first["clip_threshold"], second["clip_threshold"]} == {inf}


def test_what_the_optimizer_leaves_open_every_group_may_state():
    group = {"params": [parameter()], "lr": 0.25}
    optimizer = Adafactor([group], relative_step=False)
    assert optimizer.param_groups[0]["lr"] == 0.25
    with pytest.raises(InvalidSettings, match="lr=None"):
        Adafactor([group, {"params": [parameter()]}], relative_step=False)


def test_a_group_may_have_semantics_of_its_own():
    group = {"params": [parameter()], "semantics": "torch"}
    optimizer = Adafactor([group, {"params": [parameter()]}])
    by_torch, by_paper = optimizer.param_groups
    assert (by_torch["lr"], by_paper["lr"]) == (1e-2, None)
    placements = [optimizer._layout(g).adafactor.eps_placement for g in optimizer.param_groups]
    assert placements == [EpsPlacement.CLAMPED, EpsPlacement.ADDED]


def test_a_group_that_contradicts_the_optimizer_is_refused():
    optimizer = Adafactor([parameter()])
    with pytest.raises(InvalidSettings, match=r"lr=0\.1 and relative_step=True"):
        optimizer.add_param_group({"params": [parameter()], "lr": 0.1})


def test_other_keys_of_a_group_are_left_alone():
    optimizer = Adafactor([{"params": [parameter()], "initial_lr": 3, "name": "head"}])
    assert optimizer.param_groups[0]["initial_lr"] == 3
    assert optimizer.param_groups[0]["name"] == "head"


# --- what travels ---------------------------------------------------------------------------------


def test_the_layout_is_what_the_settings_make_of_the_state():
    optimizer, group = only_group()
    assert optimizer._layout(group) == Group(
        adafactor=AdafactorLayout(
            factored_axes=FactoredAxes.LAST_TWO,
            min_dim_size_to_factor=1,
            momentum=False,
            eps_placement=EpsPlacement.ADDED,
        )
    )
    _, group = only_group(
        beta1=0.0, factored_axes="largest_two", min_dim_size_to_factor=128, semantics="torch"
    )
    assert layout(group) == AdafactorLayout(
        factored_axes=FactoredAxes.LARGEST_TWO,
        min_dim_size_to_factor=128,
        momentum=True,
        eps_placement=EpsPlacement.CLAMPED,
    )


def test_the_settings_of_a_step_are_those_of_the_group():
    optimizer, group = only_group(
        lr=0.25,
        eps=(1e-20, 1e-2),
        clip_threshold=inf,
        decay_rate=-0.5,
        beta1=0.9,
        weight_decay=0.1,
        scale_parameter=False,
        relative_step=False,
        weight_decay_mode="plain",
    )
    step = optimizer._group_step(group, [4])
    assert step.adafactor == AdafactorStep(
        eps1=1e-20,
        eps2=1e-2,
        clip_threshold=inf,
        beta1=0.9,
        weight_decay=0.1,
        weight_decay_mode=WeightDecayMode.PLAIN,
        scale_parameter=False,
        lr=0.25,
    )
    (scalars,) = step.schedules
    assert (scalars.step_count, scalars.beta2, scalars.rho) == (4, 0.5, 0.25)


@given(step_counts=st.lists(st.integers(1, 10**6)))
def test_every_step_count_has_its_scalars_once_in_order(step_counts):
    optimizer, group = only_group(semantics="torch", lr=0.5)
    schedules = optimizer._group_step(group, step_counts).schedules
    assert [scalars.step_count for scalars in schedules] == sorted(set(step_counts))
    for scalars in schedules:
        assert scalars.beta2 == 1 - scalars.step_count**-0.8
        assert scalars.rho == min(0.5, 1 / math.sqrt(scalars.step_count))


def test_what_a_scheduler_writes_travels_with_the_next_step():
    optimizer, group = only_group(lr=0.5, relative_step=False)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 0.5)
    step = optimizer._group_step(group, [1])
    assert (step.adafactor.lr, step.schedules[0].rho) == (0.25, 0.25)


def test_a_learning_rate_may_be_a_tensor_that_is_written_in_place():
    lr = torch.tensor(0.5)
    optimizer, group = only_group(lr=lr, relative_step=False)
    assert group["lr"] is lr
    lr.fill_(0.125)
    step = optimizer._group_step(group, [1])
    assert (step.adafactor.lr, step.schedules[0].rho) == (0.125, 0.125)
    assert {type(step.adafactor.lr), type(step.schedules[0].rho)} == {float}
    lr.fill_(-0.125)
    with pytest.raises(InvalidSettings, match=r"lr=-0\.125"):
        optimizer._group_step(group, [1])


def test_a_relative_step_of_the_paper_ignores_what_is_written_to_lr_as_transformers_does():
    optimizer, group = only_group()
    before = optimizer._group_step(group, [1])
    group["lr"] = 0.5
    assert optimizer._group_step(group, [1]) == before
    assert before.adafactor.lr == 0


def test_a_value_without_meaning_that_is_written_to_a_group_does_not_travel():
    optimizer, group = only_group(lr=0.5, relative_step=False)
    group["lr"] = nan
    with pytest.raises(InvalidSettings, match="lr=nan"):
        optimizer._group_step(group, [1])
    group["lr"] = None
    with pytest.raises(InvalidSettings, match="lr=None"):
        settings_now(group)


# --- from the constructor to the weights ----------------------------------------------------------


def shard_settings(step, group_layout):
    """What a shard makes of the messages."""
    return adafactor.Settings(
        eps1=step.eps1,
        eps2=step.eps2,
        clip_threshold=step.clip_threshold,
        beta1=step.beta1 if group_layout.momentum else None,
        weight_decay=step.weight_decay,
        weight_decay_mode=step.weight_decay_mode.name.lower(),
        scale_parameter=step.scale_parameter,
        lr=step.lr,
        clamp_eps=group_layout.eps_placement is EpsPlacement.CLAMPED,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_knobs_of_every_golden_configuration_lead_to_its_weights(name):
    config = CONFIGS[name]
    optimizer, group = only_group(**config.knobs())
    group_layout = optimizer._layout(group).adafactor
    results = {}
    for tensor in TENSORS:
        weight = config.start(tensor).float()
        axes = factored_axes(
            weight.shape,
            largest_two=group_layout.factored_axes is FactoredAxes.LARGEST_TWO,
            min_dim_size_to_factor=group_layout.min_dim_size_to_factor,
        )
        state = adafactor.new_state(weight.shape, axes, momentum=group_layout.momentum)
        for count in range(1, config.last_step + 1):
            message = optimizer._group_step(group, [count])
            (scalars,) = message.schedules
            adafactor.step(
                weight,
                config.gradient(tensor, count).float(),
                state,
                axes,
                shard_settings(message.adafactor, group_layout),
                beta2=scalars.beta2,
                rho=scalars.rho,
            )
            weight = config.rounded(weight)
        results[tensor, "x", config.last_step] = weight
    assert config.differences(results) == []
