import math
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.http.conftest import client_of
from tests.http.fakes import FakeView, a_job

from adashard.wire.control import Logged
from adashard_server.http.app import create_app
from adashard_server.telemetry.history import History
from adashard_server.telemetry.metrics import Metrics

NAMES = st.text(min_size=1, max_size=128).filter(lambda s: s.isprintable() and s not in (".", ".."))


@pytest.fixture(scope="module")
def read_name():
    """Ask for the one job there is, by its name in the path; returns the name that is answered."""
    import asyncio

    view = FakeView()
    app = create_app(view, History(), Metrics("0.1.0"))

    def read(name, suffix, field):
        view.jobs = [a_job(name)]

        async def ask():
            async with client_of(app) as client:
                return await client.get(f"/api/v1/jobs/{quote(name, safe='')}{suffix}")

        return asyncio.run(ask()).json().get(field)

    return read


@settings(deadline=None)
@given(name=NAMES)
def test_a_job_is_found_by_its_name_whatever_it_is_called(read_name, name):
    assert read_name(name, "", "name") == name
    assert read_name(name, "/state", "job") == name


@pytest.mark.parametrize(
    "name", ["a/b", "a%2Fb", "a%252Fb", "x/state", "/", "%", "100 %", "größe 模型", "a?b#c", "+"]
)
def test_names_that_look_like_paths_are_names(read_name, name):
    assert read_name(name, "", "name") == name
    assert read_name(name, "/state", "job") == name


def test_a_job_that_a_slash_would_split_is_not_confused_with_another(get, view):
    view.jobs = [a_job("x", version=1), a_job("x/state", version=2)]
    assert get("/api/v1/jobs/x").json()["step"] == 1
    assert get("/api/v1/jobs/x%2Fstate").json()["step"] == 2
    assert get("/api/v1/jobs/x/state").json()["job"] == "x"


def test_a_job_tells_where_it_stands(get, training):
    training.run(30)
    job = get("/api/v1/jobs/demo").json()
    assert (job["name"], job["step"], job["generation"]) == ("demo", 30, 3)
    assert (job["worker_count"], job["min_workers"], job["status"]) == (2, 2, "running")
    assert job["latest"]["step"] == 30
    assert job["latest"]["loss"] == training.history.latest("demo").loss
    assert job["steps_per_second"] > 0


def test_a_job_without_a_step_has_no_latest_one(get, view):
    view.jobs = [a_job(version=-1, status="waiting")]
    job = get("/api/v1/jobs/demo").json()
    assert (job["step"], job["latest"], job["steps_per_second"]) == (0, None, 0.0)


def test_the_size_of_state_stands_beside_adams(get):
    state = get("/api/v1/jobs/demo/state").json()
    assert state["total_bytes"] == 24_000
    assert state["adam_bytes"] == 10_400_000
    assert state["adam_ratio"] == pytest.approx(24_000 / 10_400_000)
    assert state["weight_bytes"] == 5_200_000
    assert state["by_kind"] == {"row": 9_000, "column": 12_000, "vector": 3_000}
    assert state["by_shard"] == {"shard-0": 12_500, "shard-1": 11_500}


def test_a_job_without_weights_has_no_ratio_to_adam(get, view):
    view.jobs = [a_job(adam_bytes=0, weight_bytes=0, state_bytes={}, state_bytes_by_shard={})]
    state = get("/api/v1/jobs/demo/state").json()
    assert (state["total_bytes"], state["adam_ratio"]) == (0, None)


def test_the_history_has_phases_norms_rates_bytes_and_loss(get, training):
    training.run(3)
    answer = get("/api/v1/jobs/demo/steps").json()
    assert [step["step"] for step in answer["items"]] == [1, 2, 3]
    assert answer["next_cursor"] is None
    step = answer["items"][-1]
    assert step["phase_s"].keys() == {"receive", "wait", "exchange", "apply", "reply"}
    assert step["time"].endswith("Z")
    for name in ("duration_s", "interval_s", "gradient_norm", "update_rms", "lr_applied", "loss"):
        assert step[name] > 0, name
    assert step["pushed_bytes"] == 4 * 2_600_000
    assert step["values"] == {"loss": step["loss"]}


def test_a_range_of_the_history(get, training):
    training.run(50)
    steps = get("/api/v1/jobs/demo/steps?from=11&to=20").json()["items"]
    assert [step["step"] for step in steps] == list(range(11, 21))
    assert get("/api/v1/jobs/demo/steps?from=51").json()["items"] == []
    refused = get("/api/v1/jobs/demo/steps?from=20&to=11")
    assert (refused.status_code, refused.json()["code"]) == (400, "InvalidRequest")


@pytest.mark.parametrize(("asked", "answered"), [(-5, 1), (0, 1), (10, 10), (10**9, 300)])
def test_the_number_of_points_is_clamped(get, training, asked, answered):
    training.run(300)
    steps = get(f"/api/v1/jobs/demo/steps?max_points={asked}").json()["items"]
    assert answered - 1 <= len(steps) <= answered
    assert steps[-1]["step"] == 300


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_has_blown_up_is_null(get, training, loss):
    training.run(1)
    training.history.log(Logged(job="demo", step=1, values={"perplexity": loss}))
    (step,) = get("/api/v1/jobs/demo/steps").json()["items"]
    assert step["values"]["perplexity"] is None
    assert step["loss"] > 0
