"""To torch it is an optimizer like any other; what it refuses it refuses whole."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tests.client.sessions import FakeSession, parameters
from torch.nn import Parameter

import adashard
from adashard import Adafactor, optimizer
from adashard.wire.control import OnExisting
from adashard.wire.errors import (
    CannotReachServer,
    InvalidGradient,
    InvalidRequest,
    InvalidSettings,
    UnsupportedParameter,
)

pytestmark = pytest.mark.usefixtures("sessions")


# --- torch's contract ----------------------------------------------------------------------------


def test_it_is_a_torch_optimizer_and_connects_at_the_first_step(sessions):
    given = parameters()
    made = Adafactor(given)
    assert isinstance(made, torch.optim.Optimizer)
    assert isinstance(made, optimizer.RemoteOptimizer)
    assert sessions == []
    assert (made.global_step, made.worker_rank) == (0, None)
    made.step()
    made.step()
    (session,) = sessions
    assert all(one is other for one, other in zip(session.parameters, given, strict=True))
    assert (made.global_step, made.worker_rank) == (2, 4)


def test_gradients_are_given_as_they_are_and_absent_ones_not_at_all(sessions):
    given = parameters(3)
    given[1].grad = None
    Adafactor(given).step()
    ((push,),) = [session.pushes for session in sessions]
    assert {index: id(one) for index, one in push.items()} == {
        0: id(given[0].grad),
        2: id(given[2].grad),
    }


def test_hooks_run_around_a_step(sessions):
    made, order = Adafactor(parameters()), []
    made.register_step_pre_hook(lambda *_: order.append(("before", len(sessions))))
    made.register_step_post_hook(lambda *_: order.append(("after", len(sessions))))
    made.step()
    assert order == [("before", 0), ("after", 1)]


def test_a_closure_runs_with_gradients_and_its_loss_is_returned(sessions):
    (weight,) = parameters(1)
    made = Adafactor([weight])

    def closure():
        assert torch.is_grad_enabled()
        made.zero_grad()
        loss = (3 * weight).sum()
        loss.backward()
        return loss

    loss = made.step(closure)
    assert torch.equal(loss.detach(), torch.tensor(12.0))
    assert torch.equal(sessions[0].pushes[0][0], torch.full((2, 2), 3.0))
    assert made.step() is None


def test_a_step_is_taken_without_building_a_graph(monkeypatch):
    seen = []
    monkeypatch.setattr(
        FakeSession, "step", lambda self, push: seen.append(torch.is_grad_enabled()) or True
    )
    Adafactor(parameters()).step()
    assert seen == [False]


def test_what_a_scheduler_writes_travels_with_the_next_step(sessions):
    made = Adafactor(parameters(), lr=1.0, relative_step=False)
    scheduler = torch.optim.lr_scheduler.StepLR(made, step_size=1, gamma=0.5)
    for _ in range(3):
        made.step()
        scheduler.step()
    assert [groups[0].adafactor.lr for groups in sessions[0].groups] == [1.0, 0.5, 0.25]
    assert made.param_groups[0]["lr"] == 0.125
    assert scheduler.get_last_lr() == [0.125]


def test_every_group_has_settings_of_its_own(sessions):
    first, second = parameters()
    made = Adafactor(
        [{"params": [first], "lr": 0.5}, {"params": [second]}], lr=0.25, relative_step=False
    )
    made.step()
    assert [group.adafactor.lr for group in sessions[0].groups[0]] == [0.5, 0.25]
    assert [parameter.group for parameter in sessions[0].spec.parameters] == [0, 1]


def test_zero_grad_is_torch_s():
    given = parameters()
    made = Adafactor(given)
    made.zero_grad()
    assert all(parameter.grad is None for parameter in given)


# --- names ---------------------------------------------------------------------------------------


def test_parameters_are_named_by_group_and_place(sessions):
    first, second, third = parameters(3)
    Adafactor([{"params": [first, second]}, {"params": [third]}]).step()
    assert [one.name for one in sessions[0].spec.parameters] == ["0.0", "0.1", "1.0"]


def test_named_parameters_keep_their_names(sessions):
    model = torch.nn.Linear(2, 3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    Adafactor(model.named_parameters()).step()
    assert [(one.name, one.shape) for one in sessions[0].spec.parameters] == [
        ("weight", (3, 2)),
        ("bias", (3,)),
    ]


def test_named_and_unnamed_groups_do_not_mix_as_in_torch():
    first, second = parameters()
    with pytest.raises(ValueError, match="with/without names"):
        Adafactor([{"params": [("first", first)]}, {"params": [second]}])


def test_two_parameters_of_one_name_are_refused():
    first, second = parameters()
    with pytest.raises((InvalidRequest, ValueError), match="same"):
        Adafactor([{"params": [("x", first)]}, {"params": [("x", second)]}])


# --- what is refused -----------------------------------------------------------------------------


def embedding(rows: list[int]) -> torch.nn.Embedding:
    layer = torch.nn.Embedding(4, 2, sparse=True)
    layer(torch.tensor(rows).long()).sum().backward()
    return layer


def in_rows(rows: list[int], values: torch.Tensor) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (4, 2), check_invariants=False)


@pytest.mark.parametrize("rows", [[3, 1, 3], []])
def test_a_gradient_in_rows_is_given_coalesced_also_when_no_row_was_touched(sessions, rows):
    layer = embedding(rows)
    Adafactor(layer.named_parameters()).step()
    given = sessions[0].pushes[0][0]
    assert given.is_coalesced()
    assert given.indices().tolist() == [sorted(set(rows))]
    assert torch.equal(given.to_dense(), layer.weight.grad.to_dense())


def test_a_gradient_in_rows_that_was_set_to_zero_still_takes_part(sessions):
    layer = embedding([1])
    made = Adafactor(layer.named_parameters())
    made.zero_grad(set_to_none=False)
    made.step()
    assert torch.equal(sessions[0].pushes[0][0].to_dense(), torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("gradient", "words"),
    [
        (torch.ones(4, 2).to_sparse(), "'weight' is torch.sparse_coo over 2 axes"),
        (in_rows([0, 4], torch.ones(2, 2)), "'weight' has a row 4, and the parameter has 4 rows"),
        (in_rows([0, 2], torch.tensor([[0.0, 1.0], [0.0, torch.nan]])), "gradient of 'weight'"),
        (in_rows([2, 2], torch.full((2, 2), 3e38)), "gradient of 'weight'"),
    ],
    ids=["sparse in elements", "row out of range", "not a number", "sum too large"],
)
def test_a_sparse_gradient_that_cannot_be_right_is_refused_by_name(sessions, gradient, words):
    layer = embedding([1])
    layer.weight.grad = gradient
    made = Adafactor(layer.named_parameters())
    with pytest.raises(InvalidGradient, match=words):
        made.step()
    assert sessions == []


@pytest.mark.parametrize(
    "parameter",
    [
        Parameter(torch.zeros(2, dtype=torch.complex64)),
        Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False),
        torch.zeros(2, dtype=torch.bool),
        torch.eye(2).to_sparse(),
    ],
    ids=["complex", "integer", "bool", "sparse"],
)
def test_a_parameter_that_is_not_of_dense_floats_is_refused(parameter):
    with pytest.raises(UnsupportedParameter):
        Adafactor([parameter])


def test_a_parameter_without_elements_is_refused():
    with pytest.raises(UnsupportedParameter, match="no elements"):
        Adafactor([Parameter(torch.zeros(0, 3))])


@pytest.mark.parametrize(
    "group",
    [
        {"params": [torch.zeros(2, dtype=torch.int64)]},
        {"params": [Parameter(torch.ones(2))], "weight_decay": -1.0},
        {"params": [Parameter(torch.ones(2))], "semantics": "hf"},
        {"params": [Parameter(torch.ones(2)), Parameter(torch.ones(2)) * 2]},
    ],
    ids=["integer", "setting", "semantics", "no leaf"],
)
def test_a_group_that_is_refused_leaves_nothing(group):
    made = Adafactor(parameters())
    before = [list(one["params"]) for one in made.param_groups]
    with pytest.raises((InvalidSettings, UnsupportedParameter, ValueError)):
        made.add_param_group(group)
    assert len(made.param_groups) == len(before)
    made.step()


def test_a_group_can_be_added_before_the_first_step_and_not_after(sessions):
    made = Adafactor(parameters(1))
    made.add_param_group({"params": parameters(1)})
    made.step()
    assert len(sessions[0].spec.parameters) == 2
    with pytest.raises(InvalidSettings, match="has begun"):
        made.add_param_group({"params": parameters(1)})
    assert len(made.param_groups) == 2


def test_what_the_state_consists_of_cannot_change_on_the_way(sessions):
    made = Adafactor(parameters())
    made.step()
    made.param_groups[0]["beta1"] = 0.9
    with pytest.raises(InvalidSettings, match="group 0 was registered as"):
        made.step()
    made.param_groups[0]["beta1"] = None
    made.step()
    assert (len(sessions), sessions[0].abandoned) == (1, 0)


@pytest.mark.parametrize("name", ["nonfinite", "on_existing"])
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(name):
    with pytest.raises(InvalidSettings, match=f"{name}='x': choose"):
        Adafactor(parameters(), **{name: "x"})


# --- where it connects ---------------------------------------------------------------------------


def test_the_argument_beats_the_environment_and_the_environment_the_default(sessions, monkeypatch):
    Adafactor(parameters()).step()
    monkeypatch.setenv("ADASHARD_ADDRESS", "there:2")
    monkeypatch.setenv("ADASHARD_TOKEN", "of the environment")
    Adafactor(parameters()).step()
    Adafactor(parameters(), address="here:1", token="", on_existing="error").step()
    assert [session.address for session in sessions] == ["localhost:50051", "there:2", "here:1"]
    assert [session.token for session in sessions] == ["", "of the environment", ""]
    assert [session.on_existing for session in sessions] == [
        OnExisting.RESUME,
        OnExisting.RESUME,
        OnExisting.ERROR,
    ]


@pytest.mark.parametrize("address", ["0.0.0.0:50051", "[::]:50051"])
def test_where_a_server_listens_is_no_address(address, monkeypatch):
    with pytest.raises(InvalidSettings, match="where a server listens"):
        Adafactor(parameters(), address=address)
    monkeypatch.setenv("ADASHARD_ADDRESS", address)
    with pytest.raises(InvalidSettings, match="where a server listens"):
        Adafactor(parameters())


@pytest.mark.parametrize("address", ["host", "host:", ":50051", "host:port", "http://host/"])
def test_an_address_is_host_and_port(address):
    with pytest.raises(InvalidSettings, match="is not host:port"):
        Adafactor(parameters(), address=address)


def test_an_address_of_version_six_is_one(sessions):
    Adafactor(parameters(), address="[::1]:50051").step()
    assert sessions[0].address == "[::1]:50051"


# --- copies, and the end -------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_keeps_settings_and_joins_by_itself(sessions, duplicate):
    original = Adafactor(parameters(), lr=0.5, relative_step=False, job="j", address="here:1")
    original.step()
    twin = duplicate(original)
    assert twin.global_step == 0
    assert twin.param_groups[0]["lr"] == 0.5
    assert twin.param_groups[0]["params"][0] is not original.param_groups[0]["params"][0]
    for parameter in twin.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    twin.step()
    first, second = sessions
    assert first is not second
    assert (second.address, second.job, second.spec) == ("here:1", "j", first.spec)
    original.step()
    assert (len(first.pushes), len(second.pushes)) == (2, 1)


@pytest.mark.parametrize("error", [CannotReachServer("away"), KeyboardInterrupt()])
def test_a_step_that_fails_ends_the_session_and_the_next_joins_anew(sessions, monkeypatch, error):
    made = Adafactor(parameters())
    monkeypatch.setattr(FakeSession, "error", error)
    with pytest.raises(type(error)):
        made.step()
    assert sessions[0].abandoned == 1
    assert made.worker_rank is None
    monkeypatch.setattr(FakeSession, "error", None)
    made.step()
    assert len(sessions) == 2


def test_a_first_gradient_that_is_dropped_is_logged(sessions, monkeypatch, caplog):
    caplog.set_level("INFO", logger="adashard")
    made = Adafactor(parameters(), job="j")
    monkeypatch.setattr(
        FakeSession, "step", lambda self, push: setattr(self, "version", 7) or False
    )
    made.step()
    assert "job 'j': adopted the weights of step 7" in caplog.text


def test_closing_leaves_the_job_once(sessions):
    with Adafactor(parameters()) as made:
        made.step()
    made.close()
    assert sessions[0].closed == 1
    Adafactor(parameters()).close()
    assert len(sessions) == 1


def test_an_optimizer_that_is_forgotten_abandons_its_session(sessions):
    made = Adafactor(parameters())
    made.step()
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None
    assert sessions[0].abandoned == 1


def test_what_is_logged_before_the_first_step_is_told_after_it(sessions):
    made = Adafactor(parameters())
    made.log(loss=torch.tensor(2.0, requires_grad=True), accuracy=0.5)
    assert sessions == []
    made.step()
    made.log(loss=1.0)
    assert sessions[0].logged == [{"loss": 2.0, "accuracy": 0.5}, {"loss": 1.0}]


def test_a_base_class_leaves_its_meaning_to_subclasses():
    with pytest.raises(NotImplementedError):
        optimizer.RemoteOptimizer(
            parameters(),
            {},
            address=None,
            job="j",
            slice_bytes=None,
            min_workers=1,
            nonfinite="reject",
            on_existing="resume",
            token=None,
        )


def test_the_package_names_what_a_script_needs():
    assert adashard.Adafactor is Adafactor
    assert {"Adafactor"} <= set(adashard.__all__)
