"""Making a checkpoint: who may, what is answered, and what is said where there is none."""

import asyncio

import pytest
from tests.http.conftest import client_of
from tests.http.fakes import START_S

from adashard.wire.errors import CheckpointUnwritable
from adashard_server.http.app import create_app
from adashard_server.telemetry.history import History
from adashard_server.telemetry.metrics import Metrics

FACTS = {"checkpoint": "step-7", "version": "7", "bytes": "1234", "stall_s": "0.002"}


@pytest.fixture
def create(view, training):
    """Asks for a checkpoint of a job, of a cluster that answers so."""
    training.run(1)

    def create(answer=FACTS, *, token="", job="demo", **options):
        async def made(name):
            if isinstance(answer, Exception):
                raise answer
            return answer

        app = create_app(
            view,
            History(),
            Metrics("0.1.0"),
            clock=lambda: START_S,
            create_checkpoint=made if answer else None,
            token=token,
        )

        async def send():
            async with client_of(app) as client:
                return await client.post(f"/api/v1/jobs/{job}/checkpoints", **options)

        return asyncio.run(send())

    return create


def test_what_was_made_is_answered(create):
    answer = create()
    assert answer.status_code == 201
    assert answer.json() == {"name": "step-7", "version": 7, "size_bytes": 1234, "stall_s": 0.002}


@pytest.mark.parametrize("given", ["", "secret", "Bearer wrong", "Bearer secret ", "Basic secret"])
def test_without_the_clusters_token_nothing_is_made(create, given):
    answer = create(token="secret", headers={"authorization": given} if given else {})
    assert (answer.status_code, answer.json()["code"]) == (401, "Unauthenticated")


def test_with_the_token_it_is(create):
    answer = create(token="secret", headers={"authorization": "Bearer secret"})
    assert answer.status_code == 201


def test_a_disk_that_refuses_is_a_problem_that_names_the_file(create):
    answer = create(CheckpointUnwritable("/c/x cannot be written: no room", file="/c/x"))
    assert (answer.status_code, answer.json()["facts"]) == (400, {"file": "/c/x"})


def test_a_cluster_without_a_directory_says_so(create):
    assert create(None).json()["code"] == "CheckpointUnwritable"


def test_a_job_that_is_not_there_is_not_found(create):
    assert create(job="nothing").status_code == 404
