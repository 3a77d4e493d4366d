"""The dict of a state is the libraries' own, and comes back as it was."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tests.client.states import same, specs, state_of, weights_of

from adashard import Adafactor
from adashard.state_dict import merged_groups, pack, unpack
from adashard.wire.errors import InvalidRequest, InvalidSettings, ModelMismatch
from adashard.wire.messages import Content
from adashard.wire.spec import (
    AdafactorLayout,
    EpsPlacement,
    FactoredAxes,
    Group,
    JobSpec,
    Parameter,
)

SHAPES = ((4, 6), (3,), (2, 3, 5), ())
SPEC = JobSpec(
    parameters=tuple(Parameter(name=f"p{n}", shape=shape) for n, shape in enumerate(SHAPES)),
    groups=(Group(adafactor=AdafactorLayout()),),
    slice_bytes=64,
    min_workers=1,
)
WITH_MOMENTUM = replace(SPEC, groups=(Group(adafactor=AdafactorLayout(momentum=True)),))


def parameters(fill: float = 0.5) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.full(shape, fill)) for shape in SHAPES]


def groups_of(**settings) -> list[dict]:
    return Adafactor(parameters(), **settings).param_groups


def packed(state, spec=SPEC, *, to_transformers=False, **settings) -> dict:
    weights = weights_of(spec)
    return pack(
        state, spec, weights, groups_of(**settings), job="j", to_transformers=to_transformers
    )


def saved_and_read(found: dict) -> dict:
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stepped(optimizer: torch.optim.Optimizer, steps: int = 3) -> torch.optim.Optimizer:
    """The optimizer after some steps on recorded noise; the last parameter takes none."""
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        for parameter in optimizer.param_groups[0]["params"][:-1]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


# --- there and back ------------------------------------------------------------------------------


@given(spec=specs(), transformers_s=st.booleans(), data=st.data())
def test_a_state_comes_back_from_its_saved_dict_bit_for_bit(spec, transformers_s, data):
    masters = data.draw(st.sets(st.integers(0, len(spec.parameters) - 1)))
    state = state_of(spec, version=7, masters=tuple(masters))
    found = pack(
        state,
        spec,
        weights_of(spec),
        [{**groups_of()[0], "params": weights_of(spec)}],
        job="j",
        to_transformers=transformers_s,
    )
    again = unpack(saved_and_read(found), spec)
    assert again is not None
    assert same(again, state)
    assert again.fingerprint() == state.fingerprint()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.optim.Adafactor(parameters()),
        lambda: transformers.Adafactor(parameters()),
        lambda: transformers.Adafactor(parameters(), beta1=0.9),
    ],
    ids=["torch", "transformers", "transformers with beta1"],
)
def test_a_library_s_state_becomes_ours_and_again_the_library_s(make):
    theirs = stepped(make())
    ours = theirs.state_dict()
    spec = WITH_MOMENTUM if "exp_avg" in ours["state"][0] else SPEC
    state = unpack(ours, spec)
    assert (state.version, state.step_counts) == (3, (3, 3, 3, 0))
    to_transformers = isinstance(theirs, transformers.Adafactor)
    found = packed(state, spec, to_transformers=to_transformers)
    for index in range(3):
        mine, its = found["state"][index], ours["state"][index]
        assert mine.keys() == its.keys()
        assert all(
            torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(its[k]))
            for k in mine
            if k != "RMS"
        )


@pytest.mark.parametrize("to_transformers", [False, True])
def test_the_library_goes_on_from_our_dict_as_it_would_have_from_its_own(to_transformers):
    kind = transformers.Adafactor if to_transformers else torch.optim.Adafactor
    settings = {} if to_transformers else {"semantics": "torch"}
    alone = stepped(kind(parameters()))
    found = packed(unpack(alone.state_dict(), SPEC), to_transformers=to_transformers, **settings)
    follower = kind([p.detach().clone().requires_grad_() for p in alone.param_groups[0]["params"]])
    follower.load_state_dict(saved_and_read(found))
    stepped(alone, 5)
    stepped(follower, 5)
    for mine, its in zip(
        follower.param_groups[0]["params"], alone.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(mine, its)


def test_torch_goes_on_as_the_paper_says_where_ours_did():
    """Its eps1 bounds a root, where the paper's is added to the square; a zero row is no NaN."""
    paper = stepped(transformers.Adafactor(parameters()))
    found = packed(unpack(paper.state_dict(), SPEC))
    follower = torch.optim.Adafactor(
        [p.detach().clone().requires_grad_() for p in paper.param_groups[0]["params"]]
    )
    follower.load_state_dict(found)
    for optimizer in (paper, follower):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.param_groups[0]["params"][1].grad[:] = 1e-4
        optimizer.step()
    for mine, its in zip(
        follower.param_groups[0]["params"], paper.param_groups[0]["params"], strict=True
    ):
        assert torch.allclose(mine, its, rtol=2e-6)


def test_what_torch_saves_of_our_dict_is_ours_again_with_all_its_settings():
    found = packed(state_of(SPEC), semantics="paper", weight_decay=0.25, clip_threshold=2.0)
    between = torch.optim.Adafactor(parameters())
    between.load_state_dict(found)
    back = between.state_dict()
    assert same(unpack(back, SPEC), state_of(SPEC, version=3))
    here = groups_of(semantics="torch")
    (group,) = merged_groups(here, back)
    assert {**group, "params": None} == {
        **groups_of(semantics="paper", weight_decay=0.25, clip_threshold=2.0)[0],
        "params": None,
    }


# --- the layouts ---------------------------------------------------------------------------------


def test_means_keep_the_averaged_axis_for_torch_and_drop_it_for_transformers():
    state = state_of(WITH_MOMENTUM)
    for to_transformers, names in (
        (False, {"row_var": (2, 3, 1), "col_var": (2, 1, 5), "exp_avg": (2, 3, 5)}),
        (True, {"exp_avg_sq_row": (2, 3), "exp_avg_sq_col": (2, 5), "exp_avg": (2, 3, 5)}),
    ):
        entry = packed(state, WITH_MOMENTUM, to_transformers=to_transformers)["state"][2]
        assert {name: tuple(entry[name].shape) for name in names} == names
        assert entry.keys() - names.keys() <= {"step", "RMS"}


def test_axes_that_are_not_the_last_keep_their_place():
    layout = AdafactorLayout(factored_axes=FactoredAxes.LARGEST_TWO)
    spec = replace(
        SPEC,
        parameters=(Parameter(name="kernel", shape=(8, 6, 3, 3)),),
        groups=(Group(adafactor=layout),),
    )
    entry = packed(state_of(spec), spec)["state"][0]
    assert (tuple(entry["row_var"].shape), tuple(entry["col_var"].shape)) == (
        (8, 1, 3, 3),
        (1, 6, 3, 3),
    )


def test_step_counts_are_tensors_for_torch_and_numbers_for_transformers():
    step = packed(state_of(SPEC))["state"][2]["step"]
    assert (step.dtype, float(step)) == (torch.float32, 2.0)
    entry = packed(state_of(SPEC), to_transformers=True)["state"][1]
    assert type(entry["step"]) is int
    assert entry["RMS"] == pytest.approx(2.0)


def test_every_setting_that_torch_looks_for_is_there():
    wanted = torch.optim.Adafactor(parameters()).state_dict()["param_groups"][0].keys()
    (group,) = packed(None, clip_threshold=1.5, decay_rate=-0.7)["param_groups"]
    assert wanted <= group.keys()
    assert (group["d"], group["beta2_decay"], group["maximize"]) == (1.5, -0.7, False)
    assert group["lr"] == 0.01, "the paper's cap of a relative step"
    assert group["eps"] == (math.sqrt(1e-30), 1e-3)


def test_a_job_that_has_not_begun_has_groups_and_no_state():
    found = packed(None)
    assert (found["state"], found["remote"]["version"]) == ({}, 0)
    assert unpack(found, SPEC) is None
    assert unpack(packed(state_of(SPEC, version=0)), SPEC) is None


def test_the_version_is_the_job_s_also_where_no_parameter_has_so_many_steps():
    assert unpack(packed(state_of(SPEC, version=9)), SPEC).version == 9
    without = packed(state_of(SPEC, version=9))
    del without["remote"]
    assert unpack(without, SPEC).version == 3


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_transformers", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"semantics": "torch", "lr": 0.25},
        {"semantics": "torch", "eps": (1e-5, 1e-2)},
        {"semantics": "optax", "beta1": 0.5},
        {"relative_step": False, "lr": 0.125, "step_offset": 4, "factored_axes": "largest_two"},
    ],
    ids=["paper", "torch", "eps", "optax", "fixed"],
)
def test_our_settings_come_back_as_they_were(settings, to_transformers):
    saved = saved_and_read(packed(None, to_transformers=to_transformers, **settings))
    (found,) = merged_groups(groups_of(semantics="torch"), saved)
    (expected,) = groups_of(**settings)
    assert {**found, "params": None} == {**expected, "params": None}


def test_a_setting_that_was_changed_in_the_dict_counts():
    saved = packed(None, semantics="torch", lr=0.25)
    saved["param_groups"][0].update(lr=0.5, eps=(1e-4, 1e-2))
    (found,) = merged_groups(groups_of(), saved)
    assert (found["lr"], found["eps"]) == (0.5, (1e-4, 1e-2))


def test_what_a_scheduler_has_written_into_a_group_without_lr_is_no_setting():
    groups = groups_of()
    groups[0]["lr"] = 0.0
    saved = pack(None, SPEC, weights_of(SPEC), groups, job="j", to_transformers=False)
    assert merged_groups(groups_of(), saved)[0]["lr"] is None


def test_torch_s_settings_are_taken_where_they_mean_the_same():
    saved = torch.optim.Adafactor(
        parameters(), lr=0.5, beta2_decay=-0.5, eps=(1e-4, 1e-2), d=2.0, weight_decay=0.25
    ).state_dict()
    (clamped,) = merged_groups(groups_of(semantics="torch"), saved)
    assert (clamped["lr"], clamped["decay_rate"], clamped["clip_threshold"]) == (0.5, -0.5, 2.0)
    assert (clamped["eps"], clamped["weight_decay"]) == ((1e-4, 1e-2), 0.25)
    (added,) = merged_groups(groups_of(), saved)
    assert (added["lr"], added["eps"]) == (None, (1e-30, 1e-2))
    assert not {"beta2_decay", "d", "foreach", "maximize"} & added.keys()


def test_transformers_settings_are_ours():
    saved = transformers.Adafactor(
        parameters(), lr=0.5, relative_step=False, scale_parameter=False, beta1=0.9
    ).state_dict()
    (found,) = merged_groups(groups_of(), saved)
    assert (found["lr"], found["relative_step"], found["scale_parameter"]) == (0.5, False, False)
    assert found["beta1"] == 0.9


def test_a_dict_that_maximizes_is_refused():
    saved = torch.optim.Adafactor(parameters(), maximize=True).state_dict()
    with pytest.raises(InvalidSettings, match="maximize=True"):
        merged_groups(groups_of(), saved)


def test_parameters_and_their_names_stay_those_of_the_model():
    named = Adafactor([(f"p{n}", p) for n, p in enumerate(parameters())])
    saved = Adafactor([(f"module.p{n}", p) for n, p in enumerate(parameters())]).state_dict()
    (found,) = merged_groups(named.param_groups, saved)
    assert found["params"] is named.param_groups[0]["params"]
    assert found["param_names"] == ["p0", "p1", "p2", "p3"]


# --- another model -------------------------------------------------------------------------------


def test_the_first_tensor_that_differs_is_named_with_both_shapes():
    other = replace(SPEC, parameters=(*SPEC.parameters[:2], Parameter(name="p2", shape=(2, 3, 7))))
    other = replace(other, parameters=(*other.parameters, Parameter(name="p3", shape=(9,))))
    with pytest.raises(ModelMismatch) as refused:
        unpack(packed(state_of(other), other), SPEC)
    message = refused.value.message
    assert "parameter 2 'p2'" in message
    assert "col_var (2, 1, 7), row_var (2, 3, 1) in the state dict" in message
    assert "col_var (2, 1, 5), row_var (2, 3, 1) here" in message
    assert "p3" not in message


@pytest.mark.parametrize(
    ("mine", "theirs"), [(SPEC, WITH_MOMENTUM), (WITH_MOMENTUM, SPEC)], ids=["more", "less"]
)
def test_a_moment_too_many_or_too_few_is_another_model_s(mine, theirs):
    with pytest.raises(ModelMismatch, match=r"'p0' \(4, 6\) has .*exp_avg \(4, 6\)"):
        unpack(packed(state_of(theirs), theirs), mine)


def test_the_state_of_another_optimizer_is_refused():
    theirs = stepped(torch.optim.Adam(parameters())).state_dict()
    with pytest.raises(ModelMismatch, match="exp_avg_sq"):
        unpack(theirs, SPEC)


def test_a_master_of_another_shape_is_refused():
    saved = packed(state_of(SPEC, masters=(1,)))
    saved["remote"]["masters"][1] = torch.zeros(4)
    with pytest.raises(ModelMismatch, match=r"'p1' has a master of \(4,\) .* \(3,\) here"):
        unpack(saved, SPEC)


def test_other_groups_are_another_model_s():
    first, second, *others = parameters()
    two = Adafactor([{"params": [first]}, {"params": [second, *others]}])
    saved = Adafactor(parameters()).state_dict()
    with pytest.raises(ModelMismatch, match="1 groups in the state dict, 2 here"):
        merged_groups(two.param_groups, saved)
    short = Adafactor(parameters()[:3]).state_dict()
    with pytest.raises(ModelMismatch, match="group 0 has 3 parameters in the state dict, 4 here"):
        merged_groups(groups_of(), short)


def test_the_same_names_in_another_order_are_another_model_s():
    pair = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    saved = Adafactor([("a", pair[0]), ("b", pair[1])]).state_dict()
    with pytest.raises(ModelMismatch, match="parameter 'a' of the state dict is 'b' here"):
        merged_groups(Adafactor([("b", pair[1]), ("a", pair[0])]).param_groups, saved)


# --- numbers that cannot be right ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("row_var", torch.nan, "row_var of parameter 0 'p0' has NaN or Inf"),
        ("col_var", torch.inf, "col_var of parameter 0 'p0' has NaN or Inf"),
        ("row_var", -1.0, "row_var of parameter 0 'p0' has a negative element"),
        ("step", 2.5, "step of parameter 0 'p0' is 2.5"),
        ("step", -1.0, "step of parameter 0 'p0' is -1.0"),
        ("step", torch.nan, "step of parameter 0 'p0' is nan"),
    ],
)
def test_a_number_that_no_optimizer_comes_to_is_refused_by_name(place, value, words):
    saved = copy.deepcopy(packed(state_of(SPEC)))
    saved["state"][0][place].view(-1)[0] = value
    with pytest.raises(InvalidRequest, match=words):
        unpack(saved, SPEC)


def test_a_master_that_is_not_finite_is_refused_and_a_momentum_may_be_negative():
    saved = packed(state_of(SPEC, masters=(1,)))
    saved["remote"]["masters"][1][0] = torch.nan
    with pytest.raises(InvalidRequest, match="master of parameter 1 'p1' has NaN"):
        unpack(saved, SPEC)
    negative = packed(state_of(WITH_MOMENTUM), WITH_MOMENTUM)
    negative["state"][0]["exp_avg"].neg_()
    state = unpack(negative, WITH_MOMENTUM)
    assert bool((state.moments[0][Content.MOMENTUM] < 0).all())


@pytest.mark.parametrize(
    "remote", [3, {"version": -1}, {"version": True}, {"version": 1, "masters": []}]
)
def test_a_remote_part_that_we_have_not_written_is_refused(remote):
    with pytest.raises(InvalidRequest, match="'remote' in the state dict"):
        unpack({**packed(state_of(SPEC)), "remote": remote}, SPEC)


@pytest.mark.parametrize("saved", [{}, {"state": {}}, {"state": [], "param_groups": []}])
def test_what_is_no_dict_of_an_optimizer_is_refused(saved):
    with pytest.raises(InvalidRequest, match="'state' and 'param_groups'"):
        merged_groups(groups_of(), saved)


def test_moments_of_any_format_become_float32():
    saved = packed(state_of(SPEC))
    for entry in saved["state"].values():
        for name in entry.keys() - {"step"}:
            entry[name] = entry[name].bfloat16()
    state = unpack(saved, SPEC)
    assert {moment.dtype for moments in state.moments for moment in moments.values()} == {
        torch.float32
    }


def test_the_placement_of_eps_is_no_part_of_a_state_s_layout():
    clamped = replace(
        SPEC, groups=(Group(adafactor=AdafactorLayout(eps_placement=EpsPlacement.CLAMPED)),)
    )
    assert same(unpack(packed(state_of(SPEC)), clamped), state_of(SPEC))
