"""Adafactor's arguments and param groups, and what of them travels with a push."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.client.asked import all_knobs, all_semantics
from tests.golden.trajectories import CONFIGS, TENSORS

from adashard import Adafactor
from adashard.algorithms import layout, settings_now
from adashard.knobs import JOB_SETTINGS, KNOBS, SEMANTICS
from adashard.optimizer import RemoteOptimizer
from adashard.wire.errors import InvalidSettings
from adashard.wire.messages import AdafactorStep
from adashard.wire.placement import factored_axes
from adashard.wire.spec import (
    AdafactorLayout,
    EpsPlacement,
    FactoredAxes,
    Group,
    Recovery,
    WeightDecayMode,
)
from adashard_server.optim import adafactor
from adashard_server.optim.factored import Axes

nan, inf = math.nan, math.inf


def parameter(*shape):
    return torch.nn.Parameter(torch.ones(shape or (2, 3)))


def only_group(**knobs):
    optimizer = Adafactor([parameter()], **knobs)
    return optimizer, optimizer.param_groups[0]


# --- arguments ------------------------------------------------------------------------------------


def test_the_signature_is_transformers_own_and_then_keywords_only():
    ours = list(inspect.signature(Adafactor).parameters.values())
    theirs = list(inspect.signature(transformers.Adafactor).parameters)
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == theirs
    assert {p.kind for p in ours[len(positional) :]} == {inspect.Parameter.KEYWORD_ONLY}
    assert [p.name for p in ours if p.name in KNOBS] == list(KNOBS)
    assert {p.default for p in ours if p.name in KNOBS} == {None}


def test_every_knob_and_every_semantics_is_described():
    for name in [*inspect.signature(Adafactor).parameters, *JOB_SETTINGS]:
        assert f"\n        {name}: " in Adafactor.__doc__
    assert all(f'- `"{semantics}"`: ' in Adafactor.__doc__ for semantics in SEMANTICS)


def test_settings_of_a_job_are_those_of_the_optimizer_that_takes_the_steps(monkeypatch):
    taken = {}
    monkeypatch.setattr(RemoteOptimizer, "__init__", lambda *_, **named: taken.update(named))
    asked = {
        "max_grad_norm": 2.0,
        "rounding": "nearest",
        "seed": 3,
        "reply_dtype": torch.bfloat16,
        "wire_dtype": "int8",
        "keep_masters": True,
        "recovery": "checkpoint",
    }
    assert asked.keys() == set(JOB_SETTINGS)
    Adafactor([parameter()], **asked)
    assert {name: taken[name] for name in asked} == asked


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", -1.0),
        ("semantics", "hf"),
        ("step_offset", -1),
        ("max_grad_norm", 0.0),
        ("rounding", "up"),
        ("seed", -1),
        ("reply_dtype", torch.float64),
        ("wire_dtype", "int4"),
        ("nonfinite", "ignore"),
        ("nonfinite", None),
        ("on_existing", "overwrite"),
        ("on_existing", None),
    ],
)
def test_an_argument_without_meaning_is_refused_by_the_constructor(argument, value):
    with pytest.raises(InvalidSettings) as caught:
        Adafactor([parameter()], **{argument: value})
    assert isinstance(caught.value, ValueError)
    assert f"{argument}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "choices"),
    [
        ("nonfinite", ["reject", "skip"]),
        ("on_existing", ["resume", "replace", "error"]),
    ],
)
def test_a_choice_that_does_not_exist_shows_those_that_do(argument, choices):
    with pytest.raises(InvalidSettings) as caught:
        Adafactor([parameter()], **{argument: "something else"})
    assert all(repr(choice) in str(caught.value) for choice in choices)


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


OWN = {
    "lr": 0.5,
    "eps": (1e-20, 1e-2),
    "clip_threshold": inf,
    "decay_rate": -0.5,
    "beta1": 0.9,
    "weight_decay": 0.1,
    "scale_parameter": False,
    "relative_step": False,
    "warmup_init": True,
    "eps_placement": "added",
    "factored_axes": "largest_two",
    "min_dim_size_to_factor": 32,
    "weight_decay_mode": "plain",
    "step_offset": 100,
}


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_may_stand_in_a_group_of_its_own(knob):
    semantics = "paper" if knob == "warmup_init" else "torch"
    groups = [{"params": [parameter()], knob: OWN[knob]}, {"params": [parameter()]}]
    first, second = Adafactor(groups, semantics=semantics).param_groups
    assert first[knob] == OWN[knob]
    assert second[knob] == SEMANTICS[semantics][knob] != OWN[knob]


def test_a_group_may_have_semantics_of_its_own():
    groups = [{"params": [parameter()], "semantics": semantics} for semantics in SEMANTICS]
    optimizer = Adafactor([*groups, {"params": [parameter()]}])
    lrs = {group["semantics"]: group["lr"] for group in optimizer.param_groups[:-1]}
    assert lrs == {"paper": None, "torch": 1e-2, "transformers-trainer": 5e-5, "optax": 1.0}
    assert optimizer.param_groups[-1]["semantics"] == "paper"
    placements = [optimizer._layout(g).adafactor.eps_placement for g in optimizer.param_groups]
    assert [placement is EpsPlacement.CLAMPED for placement in placements] == [
        group["semantics"] == "torch" for group in optimizer.param_groups
    ]


def test_a_group_that_contradicts_the_optimizer_is_refused():
    optimizer = Adafactor([parameter()])
    with pytest.raises(InvalidSettings, match=r"lr=0\.1 and relative_step=True"):
        optimizer.add_param_group({"params": [parameter()], "lr": 0.1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", JOB_SETTINGS)
def test_a_group_cannot_have_settings_of_the_job_of_its_own(name):
    with pytest.raises(InvalidSettings, match=f"{name}=None stands in a param group"):
        Adafactor([{"params": [parameter()], name: None}])


def test_other_keys_of_a_group_are_left_alone():
    optimizer = Adafactor([{"params": [parameter()], "initial_lr": 3, "name": "head"}])
    assert optimizer.param_groups[0]["initial_lr"] == 3
    assert optimizer.param_groups[0]["name"] == "head"


# --- what a dead shard is rebuilt from ------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "beta1", "found"),
    [
        ("auto", None, Recovery.WORKERS),
        ("auto", 0.9, Recovery.CHECKPOINT),
        ("workers", None, Recovery.WORKERS),
        ("checkpoint", None, Recovery.CHECKPOINT),
        ("checkpoint", 0.9, Recovery.CHECKPOINT),
    ],
)
def test_it_is_decided_by_settings_and_one_group_with_a_first_moment_is_enough(
    choice, beta1, found
):
    groups = [{"params": [parameter()]}, {"params": [parameter()], "beta1": beta1}]
    assert Adafactor(groups, recovery=choice)._spec().recovery is found


def test_workers_cannot_give_back_a_first_moment():
    groups = [{"params": [parameter()]}, {"params": [parameter()], "beta1": 0.9}]
    with pytest.raises(InvalidSettings, match="recovery='workers' and beta1 in group 1") as caught:
        Adafactor(groups, recovery="workers")
    assert "recovery='checkpoint'" in caught.value.remedy


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


def test_where_eps1_enters_is_a_knob_and_torch_s_clamp_only_its_default():
    _, clamped_paper = only_group(eps_placement="clamped")
    _, added_torch = only_group(eps_placement="added", semantics="torch")
    assert layout(clamped_paper).eps_placement is EpsPlacement.CLAMPED
    assert layout(added_torch).eps_placement is EpsPlacement.ADDED


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


def test_a_step_offset_sets_back_beta2_and_leaves_the_size_of_the_step():
    optimizer, group = only_group(step_offset=100)
    plain_optimizer, plain = only_group()
    found = optimizer._group_step(group, [1, 101, 110, 40_100]).schedules
    at_count = plain_optimizer._group_step(plain, [1, 101, 110, 40_100]).schedules
    behind = plain_optimizer._group_step(plain, [1, 10, 40_000]).schedules
    assert [scalars.rho for scalars in found] == [scalars.rho for scalars in at_count]
    assert [scalars.beta2 for scalars in found[1:]] == [scalars.beta2 for scalars in behind]
    assert found[0].beta2 == 0


@given(asked=all_knobs, semantics=all_semantics)
def test_what_resolves_travels_and_a_shard_can_take_a_step_with_it(asked, semantics):
    try:
        optimizer, group = only_group(**asked, semantics=semantics)
    except InvalidSettings:
        assume(False)
    step = optimizer._group_step(group, [1])
    settings = shard_settings(step.adafactor, optimizer._layout(group).adafactor)
    weight = torch.ones(3)
    state = adafactor.new_state((3,), None, momentum=settings.beta1 is not None)
    (scalars,) = step.schedules
    adafactor.step(
        weight, torch.ones(3), state, None, settings, beta2=scalars.beta2, rho=scalars.rho
    )
    assert torch.isfinite(weight).all()


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


@pytest.mark.parametrize("semantics", sorted(SEMANTICS.keys() - {"torch"}))
def test_a_relative_step_ignores_what_is_written_to_lr_as_transformers_does(semantics):
    optimizer, group = only_group(semantics=semantics, relative_step=True)
    before = optimizer._group_step(group, [1])
    group["lr"] = 0.5
    assert optimizer._group_step(group, [1]) == before
    assert (before.adafactor.lr, before.schedules[0].rho) == (0, 1e-2)


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
        chosen = factored_axes(weight.shape, group_layout)
        axes = None if chosen is None else Axes(*chosen)
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
