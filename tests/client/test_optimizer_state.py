"""state_dict and load_state_dict of an optimizer whose state is elsewhere."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from tests.client.states import same, state_of
from torch.nn import Parameter

from adashard import Adafactor, optimizer
from adashard.state import State
from adashard.wire.control import OnExisting
from adashard.wire.errors import (
    InvalidSettings,
    JobExists,
    LeaseExpired,
    ModelMismatch,
)
from adashard.wire.spec import AdafactorLayout, Group, JobSpec, Rounding
from adashard.wire.spec import Parameter as Named

SPEC = JobSpec(
    parameters=(Named(name="0.0", shape=(4, 6)), Named(name="0.1", shape=(3,))),
    groups=(Group(adafactor=AdafactorLayout()),),
    slice_bytes=64,
    min_workers=1,
)
STATE = state_of(SPEC, version=3)


class FakeSession:
    """A session in a job whose state is what a test says."""

    made: list[FakeSession]
    here: State = STATE
    error: BaseException | None = None

    def __init__(self, transport, address, job, spec, parameters, **options):
        self.id, self.rank, self.version = "worker-1", 0, -1
        self.spec, self.options = spec, options
        self.pushes, self.closed, self.abandoned, self.applied = [], 0, 0, True
        type(self).made.append(self)

    def step(self, push):
        if self.error is not None:
            raise self.error
        self.pushes.append(push)
        self.version = self.here.version
        return True

    def state(self):
        return self.here

    def close(self):
        self.closed += 1

    def abandon(self):
        self.abandoned += 1


@pytest.fixture(autouse=True)
def sessions(monkeypatch):
    monkeypatch.setattr(FakeSession, "made", [], raising=False)
    monkeypatch.setattr(FakeSession, "here", STATE)
    monkeypatch.setattr(FakeSession, "error", None)
    monkeypatch.setattr(optimizer, "Session", FakeSession)
    return FakeSession.made


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    made = [Parameter(torch.ones(shape, dtype=dtype)) for shape in ((4, 6), (3,))]
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    return made


def saved(state: State = STATE, **settings) -> dict:
    """The dict of a job at a state."""
    before = FakeSession.here
    FakeSession.here = state
    made = Adafactor(parameters(), **settings)
    made.step()
    found = made.state_dict()
    FakeSession.here = before
    FakeSession.made.remove(made._session)
    return found


# --- out -----------------------------------------------------------------------------------------


def test_before_the_first_step_there_are_groups_and_no_state():
    found = Adafactor(parameters(), job="j").state_dict()
    assert (found["state"], found["remote"]["job"]) == ({}, "j")
    assert found["param_groups"][0]["params"] == [0, 1]


def test_the_state_is_the_job_s():
    found = saved()
    assert found["remote"]["version"] == 3
    assert torch.equal(found["state"][1]["variance"], next(iter(STATE.moments[1].values())))


@pytest.mark.parametrize("ends", ["closes", "fails"])
def test_a_worker_that_is_not_part_of_its_job_any_more_does_not_save_nothing(ends):
    made = Adafactor(parameters())
    made.step()
    if ends == "closes":
        made.close()
    else:
        FakeSession.error = LeaseExpired("evicted")
        with pytest.raises(LeaseExpired):
            made.step()
    with pytest.raises(LeaseExpired, match="state of job 'default' is on its shards"):
        made.state_dict()


def test_hooks_run_around_saving():
    made, order = Adafactor(parameters()), []
    made.register_state_dict_pre_hook(lambda one: order.append(one is made))
    made.register_state_dict_post_hook(lambda one, found: order.append("remote" in found))
    made.register_state_dict_post_hook(lambda one, found: {**found, "more": 1})
    assert made.state_dict()["more"] == 1
    assert order == [True, True]


# --- in, before the first step -------------------------------------------------------------------


def test_what_was_loaded_is_what_is_saved_until_the_first_step():
    made = Adafactor(parameters())
    made.load_state_dict(saved())
    assert made.state_dict()["remote"]["version"] == 3
    again = Adafactor(parameters())
    again.load_state_dict(made.state_dict())
    assert same(again._loaded, STATE)


def test_the_session_brings_the_loaded_state_along_until_a_step_is_taken(sessions):
    made = Adafactor(parameters())
    made.load_state_dict(saved())
    made.step()
    (first,) = sessions
    assert same(first.options["loaded"], STATE)
    FakeSession.error = LeaseExpired("evicted")
    with pytest.raises(LeaseExpired):
        made.step()
    FakeSession.error = None
    made.step()
    assert sessions[1].options["loaded"] is None, "the job has gone on since"


def test_a_first_step_that_fails_loses_no_loaded_state(sessions):
    made = Adafactor(parameters())
    made.load_state_dict(saved())
    FakeSession.error = LeaseExpired("not yet")
    with pytest.raises(LeaseExpired):
        made.step()
    FakeSession.error = None
    made.step()
    assert [same(one.options["loaded"], STATE) for one in sessions] == [True, True]


def test_loading_again_replaces_what_was_loaded(sessions):
    made = Adafactor(parameters())
    made.load_state_dict(saved())
    made.load_state_dict(Adafactor(parameters()).state_dict())
    made.step()
    assert sessions[0].options["loaded"] is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_brings_the_loaded_state_too(sessions, duplicate):
    made = Adafactor(parameters())
    made.load_state_dict(saved())
    twin = duplicate(made)
    for parameter in twin.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    twin.step()
    assert same(sessions[0].options["loaded"], STATE)


def test_masters_of_weights_that_are_still_theirs_are_brought_along(sessions):
    state = replace(STATE, masters={0: torch.full((4, 6), 1.001), 1: torch.full((3,), 5.0)})
    made = Adafactor(parameters(torch.bfloat16))
    made.load_state_dict(saved(state))
    made.step()
    assert sessions[0].options["loaded"].masters.keys() == {0}


def test_a_group_that_is_added_after_loading_has_fresh_state(sessions):
    made = Adafactor(parameters())
    made.load_state_dict(saved())
    made.add_param_group({"params": [Parameter(torch.ones(2))]})
    made.step()
    assert sessions[0].options["loaded"].step_counts == (*STATE.step_counts, 0)


def test_settings_are_loaded_and_the_parameters_stay():
    made = Adafactor(parameters(), semantics="torch")
    before = made.param_groups[0]["params"]
    made.load_state_dict(saved(weight_decay=0.25))
    assert made.param_groups[0]["params"] is before
    assert (made.param_groups[0]["semantics"], made.param_groups[0]["weight_decay"]) == (
        "paper",
        0.25,
    )


def test_a_dict_that_is_refused_changes_nothing():
    made = Adafactor(parameters())
    other = saved(weight_decay=0.25)
    other["state"][1]["variance"] = torch.zeros(7)
    with pytest.raises(ModelMismatch, match=r"'0.1' \(3,\) has variance \(7,\)"):
        made.load_state_dict(other)
    assert (made._loaded, made.param_groups[0]["weight_decay"]) == (None, 0.0)


def test_settings_that_contradict_each_other_are_refused_in_a_dict_too():
    bad = saved()
    bad["param_groups"][0]["clip_threshold"] = -1.0
    with pytest.raises(InvalidSettings, match="clip_threshold"):
        Adafactor(parameters()).load_state_dict(bad)


def test_hooks_run_around_loading_and_may_change_the_dict():
    made, order = Adafactor(parameters()), []
    given = saved()

    def older(one, state_dict):
        order.append("before")
        return {**state_dict, "remote": {**state_dict["remote"], "version": 8}}

    made.register_load_state_dict_pre_hook(older)
    made.register_load_state_dict_pre_hook(lambda one, state_dict: state_dict.update(more=2))
    made.register_load_state_dict_post_hook(lambda one: order.append(one is made))
    made.load_state_dict({**given, "more": 1})
    assert order == ["before", True]
    assert made.state_dict()["remote"]["version"] == 8


# --- in, while the job runs ----------------------------------------------------------------------


def test_the_state_of_the_running_job_is_taken_silently(sessions):
    made = Adafactor(parameters())
    made.step()
    made.load_state_dict(made.state_dict())
    made.step()
    assert (len(sessions), sessions[0].closed) == (1, 0)


@pytest.mark.parametrize(
    "other",
    [replace(STATE, version=4), replace(STATE, step_counts=(3, 3))],
    ids=["version", "state"],
)
def test_another_state_than_the_running_job_s_is_refused_with_both_steps(sessions, other):
    made = Adafactor(parameters())
    given = saved(other, weight_decay=0.25)
    made.step()
    with pytest.raises(JobExists, match=f"is at step 3, .* of step {other.version} in") as refused:
        made.load_state_dict(given)
    assert "on_existing='replace'" in refused.value.remedy
    assert made.param_groups[0]["weight_decay"] == 0.0
    made.step()
    assert (len(sessions), sessions[0].closed) == (1, 0)


def test_on_request_the_running_job_is_left_and_the_next_step_begins_it_anew(sessions):
    made = Adafactor(parameters(), on_existing="replace")
    given = saved(replace(STATE, version=9))
    made.step()
    made.load_state_dict(given)
    assert sessions[0].closed == 1
    assert made.state_dict()["remote"]["version"] == 9
    made.step()
    assert sessions[1].options["loaded"].version == 9
    assert sessions[1].options["on_existing"] is OnExisting.REPLACE


# --- what else a session is told -----------------------------------------------------------------


def test_settings_of_the_whole_job_reach_the_session(sessions):
    made = Adafactor(parameters(torch.bfloat16), rounding="stochastic", seed=5, max_grad_norm=0.5)
    made.step()
    replies = sessions[0].options["replies"]
    assert (replies.dtype, replies.rounding, replies.seed) == (None, Rounding.STOCHASTIC, 5)
    assert sessions[0].pushes[0].max_grad_norm == 0.5
    Adafactor(parameters(), reply_dtype=torch.bfloat16).step()
    assert sessions[1].options["replies"].dtype is torch.bfloat16
