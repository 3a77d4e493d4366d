"""Adafactor's knobs: what they mean when left out, which values they have, and what contradicts."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.client.asked import all_knobs, all_semantics
from transformers import trainer_optimizer

from adashard import knobs, schedule
from adashard.algorithms import Adafactor, layout, schedules
from adashard.knobs import KNOBS, SEMANTICS, resolve, resolve_job_settings
from adashard.wire.errors import InvalidSettings
from adashard.wire.placement import factored_axes

nan, inf = math.nan, math.inf
FLOAT32_EPS = torch.finfo(torch.float32).eps


def parameter():
    return torch.nn.Parameter(torch.ones(2, 3))


def refused(semantics="paper", **asked):
    """The refusal of some knobs."""
    with pytest.raises(InvalidSettings) as caught:
        resolve(asked, semantics)
    assert caught.value.remedy
    return caught.value


def job_settings(**asked):
    """Settings of a job, left out as the constructor leaves them."""
    left_out = {
        "max_grad_norm": None,
        "rounding": "nearest",
        "seed": 0,
        "reply_dtype": None,
        "wire_dtype": None,
        "keep_masters": False,
        "recovery": "auto",
    }
    return resolve_job_settings(**{**left_out, **asked})


def job_refused(**asked):
    with pytest.raises(InvalidSettings) as caught:
        job_settings(**asked)
    assert caught.value.remedy
    return caught.value


# --- what a knob means that is left out -----------------------------------------------------------


def by_trainer():
    """The group that transformers' Trainer builds for `optim="adafactor"`."""
    arguments = {f.name: f.default for f in dataclasses.fields(transformers.TrainingArguments)}
    context = trainer_optimizer.OptimizerContext(
        args=None,
        model=None,
        optimizer_kwargs={"lr": arguments["learning_rate"]},
        adam_kwargs={},
        optim_args={},
    )
    optimizer_class, named = trainer_optimizer._get_adafactor(context)
    assert arguments["weight_decay"] == SEMANTICS["transformers-trainer"]["weight_decay"]
    return optimizer_class([parameter()], **named).param_groups[0]


@pytest.mark.parametrize("semantics", ["paper", "transformers-trainer"])
def test_the_settings_of_transformers_are_its_defaults_and_those_of_its_trainer(semantics):
    (group,) = transformers.Adafactor([parameter()]).param_groups
    theirs = group if semantics == "paper" else by_trainer()
    found = resolve({}, semantics)
    shared = theirs.keys() - {"params"}
    assert len(shared) == 9
    assert {name: found[name] for name in shared} == {name: theirs[name] for name in shared}
    assert {name: found[name] for name in found.keys() - shared} == {
        "eps_placement": "added",
        "factored_axes": "last_two",
        "min_dim_size_to_factor": 1,
        "weight_decay_mode": "alpha",
        "step_offset": 0,
    }


def test_the_settings_of_torch_are_its_defaults():
    found = resolve({}, "torch")
    (theirs,) = torch.optim.Adafactor([parameter()]).param_groups
    assert found["lr"] == theirs["lr"]
    assert found["decay_rate"] == theirs["beta2_decay"]
    assert found["clip_threshold"] == theirs["d"]
    assert found["weight_decay"] == theirs["weight_decay"]
    assert theirs["eps"] == (None, found["eps"][1])
    assert found["eps"][0] == FLOAT32_EPS
    assert (found["relative_step"], found["scale_parameter"]) == (True, True)
    assert (found["eps_placement"], found["weight_decay_mode"]) == ("clamped", "lr")
    assert found["beta1"] is None


def test_the_settings_of_optax_are_its_defaults():
    """tests/optim/test_against_libraries.py has the weights that they lead to there."""
    assert resolve({}, "optax") == {
        **resolve({}, "paper"),
        "lr": 1.0,
        "relative_step": False,
        "factored_axes": "largest_two",
        "min_dim_size_to_factor": 128,
        "weight_decay_mode": "plain",
    }


def test_every_semantics_says_what_every_knob_means():
    assert {tuple(row) for row in SEMANTICS.values()} == {KNOBS}
    assert tuple(knobs._CHECKS) == KNOBS


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_an_eps_of_which_one_is_left_out_takes_that_one_from_the_semantics(semantics):
    eps1, eps2 = SEMANTICS[semantics]["eps"]
    assert resolve({"eps": (None, 0.5)}, semantics)["eps"] == (eps1, 0.5)
    assert resolve({"eps": [0.5, None]}, semantics)["eps"] == (0.5, eps2)


@given(
    step_count=st.integers(1, 10**6),
    lr=st.floats(1e-6, 1),
    step_size=st.sampled_from(["relative", "warmup", "lr"]),
    semantics=st.sampled_from(["paper", "transformers-trainer"]),
)
def test_a_step_is_as_large_as_transformers_makes_it(step_count, lr, step_size, semantics):
    asked = {
        "lr": lr if step_size == "lr" else None,
        "relative_step": step_size != "lr",
        "warmup_init": step_size == "warmup",
        "scale_parameter": False,
    }
    (theirs,) = transformers.Adafactor([parameter()], **asked).param_groups
    (ours,) = schedules(resolve(asked, semantics), [step_count])
    assert ours.rho == transformers.Adafactor._get_lr(theirs, {"step": step_count, "RMS": 1.0})


@pytest.mark.parametrize(
    ("semantics", "sizes"),
    [
        ("paper", {1: 1e-2, 10_000: 1e-2, 40_000: 5e-3}),
        ("torch", {1: 1e-2, 10_000: 1e-2, 40_000: 5e-3}),
        ("transformers-trainer", {1: 5e-5, 10_000: 5e-5, 40_000: 5e-5}),
        ("optax", {1: 1.0, 10_000: 1.0, 40_000: 1.0}),
    ],
)
def test_every_semantics_has_its_sizes_of_steps_and_all_the_same_beta2(semantics, sizes):
    found = schedules(resolve({}, semantics), sizes)
    assert {scalars.step_count: scalars.rho for scalars in found} == sizes
    assert [scalars.beta2 for scalars in found] == [schedule.beta2(t, -0.8) for t in sizes]


@pytest.mark.parametrize(
    ("shape", "last_two", "by_optax"),
    [
        ((), None, None),
        ((1000,), None, None),
        ((1, 1000), (0, 1), None),
        ((128, 127), (0, 1), None),
        ((128, 128), (0, 1), (0, 1)),
        ((256, 128, 3, 3), (2, 3), (0, 1)),
        ((128, 2, 500), (1, 2), (0, 2)),
    ],
)
def test_every_semantics_factors_its_axes(shape, last_two, by_optax):
    found = {name: factored_axes(shape, layout(resolve({}, name))) for name in SEMANTICS}
    assert found == {
        "paper": last_two,
        "torch": last_two,
        "transformers-trainer": last_two,
        "optax": by_optax,
    }


# --- what resolves --------------------------------------------------------------------------------


@given(asked=all_knobs, semantics=all_semantics)
def test_knobs_resolve_to_every_setting_and_settings_to_themselves(asked, semantics):
    try:
        settings = resolve(asked, semantics)
    except InvalidSettings:
        assume(False)
    assert tuple(settings) == KNOBS
    assert resolve(settings, semantics) == settings
    for name in set(KNOBS) - {"lr", "eps"}:
        expected = SEMANTICS[semantics][name] if asked[name] is None else asked[name]
        assert settings[name] == expected
    given_eps = asked["eps"] or (None, None)
    eps = zip(settings["eps"], given_eps, SEMANTICS[semantics]["eps"], strict=True)
    assert all(found == (default if own is None else own) for found, own, default in eps)


@given(asked=all_knobs, semantics=all_semantics)
def test_a_relative_step_has_lr_under_torch_only_and_any_other_step_always(asked, semantics):
    try:
        settings = resolve(asked, semantics)
    except InvalidSettings:
        assume(False)
    if settings["relative_step"] and semantics != "torch":
        assert settings["lr"] is None
    else:
        default = SEMANTICS[semantics]["lr"]
        assert settings["lr"] == (default if asked["lr"] is None else asked["lr"])


@given(asked=all_knobs, semantics=all_semantics)
def test_settings_contradict_each_other_just_by_those_that_are_named(asked, semantics):
    try:
        resolve(asked, semantics)
    except InvalidSettings as caught:
        refusal = caught
    else:
        assume(False)
    assert "contradict each other" in str(refusal)
    named = refusal.facts.keys() & {*KNOBS, "semantics"}
    assert named == refusal.facts.keys()
    assert len(named) >= 2
    assert all(f"{name}=" in refusal.message for name in named)
    # How a step is sized has to be said wherever something else is; no other setting is needed.
    alone = {name: asked[name] for name in named - {"semantics"} | {"relative_step", "lr"}}
    assert refused(semantics, **alone).message == refusal.message


@pytest.mark.parametrize("knob", ["eps", "clip_threshold", "beta1", "weight_decay", "decay_rate"])
def test_numbers_of_numpy_are_numbers(knob):
    value = {"eps": (np.float32(0.5), np.float64(0.5)), "decay_rate": np.float32(-0.5)}
    settings = resolve({knob: value.get(knob, np.float64(0.5))}, "paper")
    found = settings[knob] if knob == "eps" else (settings[knob],)
    assert {type(number) for number in found} == {float}
    assert {abs(number) for number in found} == {0.5}


@pytest.mark.parametrize("knob", ["min_dim_size_to_factor", "step_offset"])
def test_whole_numbers_of_numpy_are_whole_numbers(knob):
    found = resolve({knob: np.int64(3)}, "paper")[knob]
    assert (type(found), found) == (int, 3)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "relative_step", "warmup_init"),
    list(itertools.product([None, 1e-3, 0.0], [True, False], [True, False])),
)
def test_whatever_transformers_refuses_is_refused_and_a_step_without_size_too(
    lr, relative_step, warmup_init
):
    asked = {"lr": lr, "relative_step": relative_step, "warmup_init": warmup_init}
    try:
        transformers.Adafactor([parameter()], **asked)
        refused_there = False
    except ValueError:
        refused_there = True
    if refused_there or (lr is None and not relative_step):
        refused(**asked)
    else:
        resolve(asked, "paper")


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"lr": 0.01}, ["lr=0.01", "relative_step=True", "semantics='paper'"]),
        (
            {"lr": 0.01, "relative_step": True, "semantics": "optax"},
            ["lr=0.01", "relative_step=True", "semantics='optax'"],
        ),
        (
            {"warmup_init": True, "relative_step": False, "lr": 0.01},
            ["warmup_init=True", "relative_step=False"],
        ),
        (
            {"warmup_init": True, "semantics": "transformers-trainer"},
            ["warmup_init=True", "relative_step=False", "semantics='transformers-trainer'"],
        ),
        ({"warmup_init": True, "semantics": "torch"}, ["warmup_init=True", "semantics='torch'"]),
        ({"relative_step": False}, ["relative_step=False", "lr=None"]),
        ({"weight_decay_mode": "lr"}, ["weight_decay_mode='lr'", "lr=None"]),
        (
            {"weight_decay_mode": "lr", "relative_step": True, "semantics": "optax"},
            ["weight_decay_mode='lr'", "lr=None"],
        ),
        (
            {"eps_placement": "clamped", "eps": (0, None)},
            ["eps=(0.0, 0.001)", "eps_placement='clamped'"],
        ),
        (
            {"eps": (0.0, 1.0), "semantics": "torch"},
            ["eps=(0.0, 1.0)", "eps_placement='clamped'"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_both_named(asked, named):
    refusal = refused(**asked)
    assert refusal.message.startswith(" and ".join(named[:2]))
    assert all(words in refusal.message for words in named)
    assert "contradict each other" in refusal.message


@pytest.mark.parametrize(
    "asked",
    [
        {"semantics": "torch", "relative_step": False},
        {"semantics": "torch", "beta1": 0.9, "clip_threshold": 0.5, "eps_placement": "added"},
        {"semantics": "paper", "eps_placement": "clamped"},
        {"semantics": "paper", "eps": (0, 0), "clip_threshold": inf},
        {"semantics": "paper", "scale_parameter": False, "step_offset": 10**6},
        {"semantics": "transformers-trainer", "relative_step": True, "warmup_init": True},
        {"semantics": "optax", "relative_step": True, "weight_decay_mode": "alpha"},
        {"semantics": "optax", "weight_decay_mode": "lr", "lr": 0.0},
    ],
)
def test_what_is_merely_unusual_is_not_refused(asked):
    settings = resolve(asked, asked["semantics"])
    assert all(settings[name] == value for name, value in asked.items() if name in KNOBS)


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
        ("eps_placement", ["inside", True]),
        ("factored_axes", ["last2", "LAST_TWO", 1, (0, 1)]),
        ("min_dim_size_to_factor", [0, -1, 1.5, True, "128"]),
        ("weight_decay_mode", ["decoupled", 0]),
        ("step_offset", [-1, 1.0, True, nan, "1"]),
    ],
)
def test_a_value_without_meaning_is_named(knob, values):
    for value in values:
        assert f"{knob}={value!r}" in refused("torch", **{knob: value}).message


@pytest.mark.parametrize("semantics", ["hf", "Paper", None, 1])
def test_a_semantics_that_does_not_exist_shows_those_that_do(semantics):
    refusal = refused(semantics)
    assert f"semantics={semantics!r}" in refusal.message
    assert all(repr(row) in refusal.remedy for row in SEMANTICS)


@pytest.mark.parametrize(
    ("knob", "choices"),
    [
        ("eps_placement", ["added", "clamped"]),
        ("factored_axes", ["last_two", "largest_two"]),
        ("weight_decay_mode", ["alpha", "lr", "plain"]),
    ],
)
def test_a_choice_that_does_not_exist_shows_those_that_do(knob, choices):
    refusal = refused(**{knob: "something else"})
    assert all(repr(choice) in refusal.remedy for choice in choices)


# --- what holds for a whole job -------------------------------------------------------------------


def test_masters_are_not_rounded_by_chance():
    refusal = job_refused(keep_masters=True, rounding="stochastic")
    assert refusal.facts == {"keep_masters": "True", "rounding": "stochastic"}


@pytest.mark.parametrize(("name", "value"), [("keep_masters", 1), ("recovery", "disk")])
def test_a_setting_of_the_job_without_meaning_is_named(name, value):
    assert f"{name}={value!r}" in job_refused(**{name: value}).message


@given(
    max_grad_norm=st.none() | st.floats(0, 1e30, exclude_min=True) | st.integers(1, 10),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    seed=st.integers(0, 2**63 - 1),
    reply_dtype=st.sampled_from([None, torch.bfloat16, torch.float16]),
    wire_dtype=st.sampled_from([None, "float32", "bfloat16", "float16", "int8", "auto"]),
    keep_masters=st.booleans(),
    recovery=st.sampled_from(["auto", "workers", "checkpoint"]),
)
def test_settings_of_a_job_are_returned_as_they_are(**asked):
    assume(not (asked["keep_masters"] and asked["rounding"] == "stochastic"))
    assert job_settings(**asked) == asked
    assert tuple(job_settings(**asked)) == knobs.JOB_SETTINGS


def test_settings_of_a_job_have_one_type_each():
    found = job_settings(max_grad_norm=np.float32(2), seed=np.int64(3))
    assert (type(found["max_grad_norm"]), found["max_grad_norm"]) == (float, 2.0)
    assert (type(found["seed"]), found["seed"]) == (int, 3)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_grad_norm", [0, 0.0, -1.0, nan, inf, "1", True]),
        ("rounding", ["up", "Nearest", None, 1]),
        ("seed", [-1, 2**63, 1.0, True, None, "0"]),
        ("reply_dtype", [torch.float64, torch.int8, torch.ones(2), "int8", "auto", "", 1]),
        ("wire_dtype", [torch.float64, "fp16", "Int8", "", torch.ones(2), b"int8", 8, True]),
    ],
)
def test_a_value_without_meaning_for_a_job_is_named(name, values):
    for value in values:
        assert f"{name}={value!r}" in job_refused(**{name: value}).message


@pytest.mark.parametrize("word", ["float32", "bfloat16", "float16"])
def test_formats_can_be_given_by_name_or_as_those_of_torch(word):
    dtype = getattr(torch, word)
    for given_as in (word, dtype):
        found = job_settings(reply_dtype=given_as, wire_dtype=given_as)
        assert (found["reply_dtype"], found["wire_dtype"]) == (dtype, word)
    assert job_settings(wire_dtype=torch.int8)["wire_dtype"] == "int8"


def test_a_link_is_not_measured_unless_that_is_asked_for():
    assert inspect.signature(Adafactor).parameters["wire_dtype"].default is None


def test_replies_that_are_never_rounded_contradict_stochastic_rounding():
    refusal = job_refused(rounding="stochastic", reply_dtype=torch.float32)
    assert "rounding='stochastic' and reply_dtype=torch.float32 contradict" in refusal.message
    assert job_settings(rounding="nearest", seed=7, reply_dtype=torch.float32)["seed"] == 7


@pytest.mark.parametrize("name", knobs.JOB_SETTINGS)
def test_what_holds_for_a_whole_job_is_refused_in_a_group(name):
    with pytest.raises(InvalidSettings, match=f"{name}=1 stands in a param group"):
        knobs.refuse_job_settings_in({"lr": 1.0, name: 1})
