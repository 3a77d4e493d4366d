"""Bad input: a clear error, and nothing lost."""

from __future__ import annotations

import socket

import httpx
import pytest
import torch
from tests.spec.conftest import Feed, free_port, rarely_on_processes
from tests.spec.crews import SLICE_BYTES, crew_of, filled, same

import adashard
from adashard.wire import version
from adashard.wire.errors import (
    CannotReachServer,
    InvalidGradient,
    InvalidSettings,
    PortInUse,
    UnsupportedParameter,
    VersionSkew,
)
from adashard_server import LocalCluster


def feed_of(**tensors: torch.Tensor) -> Feed:
    return Feed(tensors or {"weight": torch.ones(3, 4)})


def test_no_server_is_an_error_that_says_what_was_tried_and_what_to_check(monkeypatch):
    monkeypatch.setattr("adashard.session.CONNECT_BUDGET_S", 0.5)
    address = f"127.0.0.1:{free_port()}"
    feed = feed_of()
    optimizer = adashard.Adafactor(feed.named(), address=address)
    feed.give({"weight": torch.ones(3, 4)})
    with pytest.raises(CannotReachServer) as raised:
        optimizer.step()
    assert raised.value.facts["address"] == address
    assert int(raised.value.facts["attempts"]) >= 1
    assert float(raised.value.facts["seconds"]) >= 0.5
    assert address in raised.value.message
    assert "tries in" in raised.value.message
    assert "adashard status" in raised.value.remedy
    assert torch.equal(feed.weights()["weight"], torch.ones(3, 4))


def test_nan_in_a_gradient_names_tensor_worker_and_step_and_touches_no_weight(bench):
    feed = feed_of(good=torch.ones(2, 2), bad=torch.ones(3))
    with bench(2).adafactor(feed.named()) as optimizer:
        feed.give({"good": torch.ones(2, 2), "bad": torch.ones(3)})
        optimizer.step()
        before = feed.weights()
        feed.give({"good": torch.ones(2, 2), "bad": torch.tensor([1.0, float("nan"), 1.0])})
        with pytest.raises(InvalidGradient, match=r"'bad'.*step 2") as raised:
            optimizer.step()
        assert raised.value.facts["worker"] == optimizer._session.id
        assert "good" not in raised.value.facts["tensors"]
        assert all(torch.equal(before[name], now) for name, now in feed.weights().items())
        feed.give({"good": torch.ones(2, 2), "bad": torch.ones(3)})
        optimizer.step()
        assert optimizer.global_step == 2


def test_nan_on_one_shard_has_all_shards_skip_and_the_next_step_is_as_without(bench):
    start, first, second = (filled({"matrix": (24, 5)}, seed) for seed in range(3))
    broken = {"matrix": first["matrix"].clone()}
    broken["matrix"][20, 3] = float("nan")  # one element of one slice
    options = {"slice_bytes": SLICE_BYTES, "nonfinite": "skip", "beta1": 0.9}
    with crew_of(bench(2), start, **options) as crew:
        assert len(crew.shares()) == 2
        crew.step(first)
        before = crew.weights()
        crew.step(broken)
        assert same(before, crew.weights())
        crew.step(second)
        found = crew.weights()
    with crew_of(bench(2), start, **options) as crew:
        crew.step(first)
        crew.step(second)
        assert same(found, crew.weights())
    assert not same(before, found)


def test_a_parameter_that_is_not_floating_point_is_refused():
    with pytest.raises(UnsupportedParameter, match=r"torch\.int64"):
        adashard.Adafactor([torch.nn.Parameter(torch.arange(3), requires_grad=False)])


def test_settings_that_contradict_are_both_named():
    with pytest.raises(InvalidSettings, match=r"lr.*relative_step|relative_step.*lr"):
        adashard.Adafactor([torch.nn.Parameter(torch.ones(2))], lr=1e-3)


def test_an_unknown_job_is_a_problem_document(bench):
    answer = httpx.get(f"{bench(1).cluster.url}/api/v1/jobs/nobody/state", trust_env=False)
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("application/problem+json")
    assert "nobody" in answer.json()["detail"]


@pytest.mark.parametrize("option", ["port", "http_port"])
def test_a_port_in_use_is_an_error_that_names_it(kind, option):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)):
            LocalCluster(1, in_process=kind == "threads", **{option: port}).start()


def test_a_client_of_another_version_is_refused_with_both_versions(bench, monkeypatch):
    monkeypatch.setattr("adashard.session.VERSION", "0.9.0")
    feed = feed_of()
    with pytest.raises(VersionSkew, match=r"0\.9\.0") as raised:
        bench(1).adafactor(feed.named()).step()
    assert version.VERSION in raised.value.message


@rarely_on_processes
def test_two_clusters_are_never_in_each_others_way(kind):
    in_process = kind == "threads"
    with (
        LocalCluster(1, in_process=in_process) as one,
        LocalCluster(1, in_process=in_process) as other,
    ):
        assert one.address != other.address
        assert one.url != other.url
        for cluster in (one, other):
            feed = feed_of()
            with adashard.Adafactor(feed.named(), address=cluster.address) as optimizer:
                feed.give({"weight": torch.ones(3, 4)})
                optimizer.step()
                assert optimizer.global_step == 1
