"""What an optimizer does with gradients that are of no use: refuse, skip, leave out."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.client.sessions import FakeSession, parameters
from torch.nn import Parameter

import adashard
from adashard import Adafactor, omissions
from adashard.omissions import Omissions
from adashard.wire.errors import CannotReachServer, NotFinite

pytestmark = pytest.mark.usefixtures("sessions")


# --- refused, or the whole job skips -------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_is_refused_with_tensor_worker_and_step(sessions, value):
    given = parameters(6)
    made = Adafactor(given)
    made.step()
    for parameter in given[1:]:
        parameter.grad[0, 0] = value
    with pytest.raises(NotFinite) as refused:
        made.step()
    assert refused.value.facts == {
        "tensors": "'0.1', '0.2', '0.3'",
        "worker": "worker-1",
        "step": "2",
    }
    assert "and 2 more" in refused.value.message
    assert len(sessions[0].pushes) == 1
    for parameter in given:
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    assert (len(sessions), len(sessions[0].pushes)) == (1, 2), "the session goes on"


def test_before_it_has_joined_the_worker_has_no_name():
    (weight,) = parameters(1)
    weight.grad[0, 0] = torch.nan
    with pytest.raises(NotFinite, match=r"'0.0' \(worker not yet joined, step 1 of job 'j'"):
        Adafactor([weight], job="j").step()


def test_on_request_the_job_is_told_whose_gradients_are_not_finite_and_sent_none(sessions, caplog):
    one, other = parameters(2)
    other.grad[0, 0] = torch.nan
    Adafactor([one, other], nonfinite="skip", job="j").step()
    assert sessions[0].not_finite == [(1,)]
    assert sessions[0].pushes == [{}]
    assert "job 'j': step 1 is skipped: NaN or Inf in the gradient of '0.1'" in caplog.text


def test_rows_that_are_not_finite_have_the_job_skip_as_well(sessions):
    layer = torch.nn.Embedding(4, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    layer.weight.grad = layer.weight.grad * torch.inf
    Adafactor(layer.named_parameters(), nonfinite="skip").step()
    assert (sessions[0].not_finite, sessions[0].pushes) == ([(0,)], [{}])


@pytest.mark.usefixtures("no_waits")
def test_every_shard_hears_in_the_first_frame_what_is_not_finite(stage):
    play = stage(shards=2)
    play.open()
    play.session.step(dataclasses.replace(play.push(), gradients={}, not_finite=(1,)))
    for shard in play.shards:
        (begin,) = (one for one in shard.begins if one.push)
        assert (begin.not_finite, begin.present) == ((1,), b"\x00")


# --- steps without a gradient --------------------------------------------------------------------


def test_a_skipped_step_is_a_push_of_nothing_and_leaves_the_gradients_alone(sessions):
    given = parameters()
    made = Adafactor(given)
    made.step()
    before = [parameter.grad for parameter in given]
    made.skip_step()
    assert sessions[0].pushes[1] == {}
    assert sessions[0].not_finite == [(), ()]
    assert made.global_step == 2
    assert all(one.grad is grad for one, grad in zip(given, before, strict=True))


def test_a_skipped_step_that_fails_ends_the_session(sessions, monkeypatch):
    made = Adafactor(parameters())
    monkeypatch.setattr(FakeSession, "error", CannotReachServer("away"))
    with pytest.raises(CannotReachServer):
        made.skip_step()
    assert sessions[0].abandoned == 1


# --- loss scaling --------------------------------------------------------------------------------


class Loop:
    """A training loop under loss scaling, whose losses overflow at will."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.weight = Parameter(torch.ones(3))
        self.optimizer = Adafactor([self.weight], job="j")
        self.scaler = scaler

    def iterate(self, *, overflow: bool, unscale: bool = False) -> None:
        self.optimizer.zero_grad()
        loss = (self.weight * (torch.inf if overflow else 3.0)).sum()
        self.scaler.scale(loss).backward()
        if unscale:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_([self.weight], 1e9)
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, adashard.GradScaler])
def test_under_loss_scaling_the_unscaled_gradient_is_pushed(sessions, scaler, unscale):
    loop = Loop(scaler("cpu", init_scale=1024.0))
    loop.iterate(overflow=False, unscale=unscale)
    assert torch.equal(sessions[0].pushes[0][0], torch.full((3,), 3.0))


@pytest.mark.parametrize("unscale", [False, True])
def test_a_step_that_overflows_is_not_pushed_by_torchs_scaler(sessions, unscale):
    loop = Loop(torch.amp.GradScaler("cpu"))
    loop.iterate(overflow=True, unscale=unscale)
    assert sessions == []
    assert loop.scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("unscale", [False, True])
def test_a_step_that_overflows_is_pushed_without_a_gradient_by_ours(sessions, unscale):
    loop = Loop(adashard.GradScaler("cpu"))
    for overflow in (True, True, False, True):
        loop.iterate(overflow=overflow, unscale=unscale)
    assert [len(push) for push in sessions[0].pushes] == [0, 0, 1, 0]
    assert loop.scaler.get_scale() == 2.0**13


def test_a_step_that_somebody_has_wrapped_is_seen_all_the_same(sessions):
    """As accelerate does, to find out whether the scaler calls it."""
    loop = Loop(adashard.GradScaler("cpu"))
    loop.optimizer.step = functools.wraps(loop.optimizer.step)(
        lambda *given, inner=loop.optimizer.step: inner(*given)
    )
    for overflow in (False, True):
        loop.iterate(overflow=overflow)
    assert [len(push) for push in sessions[0].pushes] == [1, 0]


def test_a_step_that_fails_under_the_scaler_is_not_skipped_instead(sessions, monkeypatch):
    loop = Loop(adashard.GradScaler("cpu"))
    monkeypatch.setattr(FakeSession, "error", CannotReachServer("away"))
    with pytest.raises(CannotReachServer):
        loop.iterate(overflow=False)
    assert len(sessions) == 1


def test_ours_does_with_other_optimizers_what_torchs_does():
    weight = Parameter(torch.ones(3))
    local, scaler = torch.optim.SGD([weight], lr=1.0), adashard.GradScaler("cpu")
    scaler.scale((weight * torch.inf).sum()).backward()
    scaler.step(local)
    assert torch.equal(weight, torch.ones(3))


def test_a_scaler_that_is_switched_off_only_steps(sessions):
    loop = Loop(adashard.GradScaler("cpu", enabled=False))
    loop.iterate(overflow=False)
    assert [len(push) for push in sessions[0].pushes] == [1]


# --- steps that are left out ---------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=12))
def test_every_run_of_two_or_more_steps_left_out_is_warned_of_once(taken):
    """A loop clears its gradients first; after the last iteration once more."""
    counting = Omissions()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for number, step in enumerate(taken):
            if number:
                counting.dropped("j")
            if step:
                counting.stepped()
        if taken:
            counting.dropped("j")
    runs = "".join("s" if step else "-" for step in taken).split("s")
    assert len(seen) == sum(len(run) > omissions.TOLERATED for run in runs)


def test_the_second_step_in_a_row_that_is_left_out_is_warned_of_where_gradients_are_cleared():
    loop = Loop(torch.amp.GradScaler("cpu"))
    for overflow in (False, True, True):
        loop.iterate(overflow=overflow)
    with pytest.warns(RuntimeWarning, match=r"2 times in a row.*skip_step\(\)") as warned:
        loop.iterate(overflow=False)
    assert [warning.filename for warning in warned] == [__file__]


def test_clearing_gradients_that_are_not_there_or_were_used_is_nothing_left_out():
    loop = Loop(adashard.GradScaler("cpu"))
    for overflow in (True, True, False):
        loop.optimizer.zero_grad(set_to_none=False)
        loop.iterate(overflow=overflow)
        loop.optimizer.zero_grad()
        loop.optimizer.zero_grad()
