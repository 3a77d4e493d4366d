"""A job goes on from a checkpoint as if nothing had been: same bits, on any number of shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tests.spec.conftest import Bench
from tests.spec.crews import MODEL, SLICE_BYTES, Crew, crew_of, filled, same
from torch import Tensor

from adashard.wire.errors import CheckpointUnreadable, JobLost
from adashard_server import LocalCluster
from adashard_server.app.shard import ShardProcess
from adashard_server.cluster.checkpoints import CheckpointSettings
from adashard_server.cluster.leases import LeaseSettings
from adashard_server.config import ShardSettings

STEPS, SAVED_AT = 10, 5
JOINED = 1  # a crew joins with a step of its own, in which nobody has a gradient
JOB = "a job"
QUICK = LeaseSettings(grace_s=0.2, renew_s=0.1, replace_after_s=0.2)


def cluster_of(shards: int, directory: Path, **options) -> LocalCluster:
    return LocalCluster(shards, in_process=True, checkpoint_dir=str(directory), **options)


def join(cluster: LocalCluster, start: Mapping[str, Tensor]) -> Crew:
    """A worker with weights of its own."""
    return crew_of(Bench(cluster, JOB), start, slice_bytes=SLICE_BYTES)


@contextmanager
def training(
    shards: int, directory: Path, start: Mapping[str, Tensor], **options
) -> Iterator[Crew]:
    """A worker in a cluster that begins with nothing but what is in a directory."""
    with cluster_of(shards, directory, **options) as cluster, join(cluster, start) as crew:
        yield crew


def step(crew: Crew, first: int, last: int) -> None:
    """The steps after `first` up to `last`."""
    for number in range(first + 1, last + 1):
        crew.step(filled(MODEL, 100 + number))


def save(cluster: LocalCluster) -> str:
    """Has a checkpoint made of the job as it is; its name."""
    url = f"{cluster.url}/api/v1/jobs/{JOB.replace(' ', '%20')}/checkpoints"
    answer = httpx.post(url, trust_env=False)
    assert answer.status_code == 201, answer.text
    return answer.json()["name"]


def moments(crew: Crew) -> dict:
    state = crew.optimizers[0].state_dict()["state"]
    return {(index, name): one for index, entry in state.items() for name, one in entry.items()}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory):
    """Ten steps on two shards, saved at the fifth: the directory, and weights then and at the end.

    And the state at the end.
    """
    directory = tmp_path_factory.mktemp("checkpoints")
    with training(2, directory, filled(MODEL, 0)) as crew:
        step(crew, 0, SAVED_AT)
        assert save(crew.table.cluster) == f"step-{JOINED + SAVED_AT}"
        weights = crew.weights()
        step(crew, SAVED_AT, STEPS)
        return directory, weights, crew.weights(), moments(crew)


def test_uninterrupted_is_resumed(uninterrupted) -> None:
    directory, _, weights, state = uninterrupted
    with training(3, directory, filled(MODEL, 1), resume="latest") as crew:
        step(crew, SAVED_AT, STEPS)
        assert same(crew.weights(), weights)
        assert same(moments(crew), state)


def test_uninterrupted_is_not_cold(uninterrupted, tmp_path: Path) -> None:
    _, saved, weights, _ = uninterrupted
    with training(2, tmp_path, saved) as crew:  # the same weights, and fresh state
        step(crew, SAVED_AT, STEPS)
        assert not same(crew.weights(), weights)


def test_a_job_that_resumes_never_begins_with_weights_of_a_worker(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged checkpoint is passed over for an older one; without one the job is lost."""
    caplog.set_level("INFO", "adashard.membership")
    with training(2, tmp_path, filled(MODEL, 0)) as crew:
        older = save(crew.table.cluster)
        weights = crew.weights()
        step(crew, 0, 1)
        newer = save(crew.table.cluster)
    folder = tmp_path / "a%20job"
    damage(folder / newer / "shard-1-weights.safetensors")
    with training(3, tmp_path, filled(MODEL, 1), resume="latest") as crew:
        assert same(crew.weights(), weights)
    assert f"'wide/7': going on from checkpoint {older}, at step {JOINED}" in caplog.text
    damage(folder / older / "shard-0-state.safetensors")
    with (
        cluster_of(1, tmp_path, resume="latest") as cluster,
        pytest.raises(JobLost, match="damaged in tensor"),
    ):
        join(cluster, filled(MODEL, 1))


def test_a_shard_that_does_not_see_the_directory_says_so_at_its_start(tmp_path: Path) -> None:
    with cluster_of(1, tmp_path / "shared") as cluster:
        elsewhere = ShardSettings(coordinator=cluster.address, checkpoint_dir=str(tmp_path))
        with pytest.raises(CheckpointUnreadable, match="is not the directory of checkpoints"):
            ShardProcess(elsewhere).start()


@pytest.mark.processes
def test_processes_resume_from_the_one_that_is_named_and_cut_their_own(tmp_path: Path) -> None:
    """And their old ones go, but not the one that somebody has asked for."""
    with training(1, tmp_path, filled(MODEL, 0)) as crew:
        asked_for = tmp_path / "a%20job" / save(crew.table.cluster)
        step(crew, 0, 1)
        save(crew.table.cluster)
    keep = CheckpointSettings(every_steps=2, keep_last=1, keep_best=0)
    cluster = LocalCluster(
        1, checkpoint_dir=str(tmp_path), checkpoints=keep, resume=str(asked_for), spare=False
    )
    with cluster, join(cluster, filled(MODEL, 1)) as crew:
        assert same(crew.weights(), filled(MODEL, 0))
        number, kept = 0, set[str]()
        while number < 20 or len(kept) != 3:
            number += 1
            step(crew, number - 1, number)
            kept = {one.name for one in asked_for.parent.iterdir() if one.suffix != ".partial"}
    assert {asked_for.name, "step-2"} < kept


def test_when_nobody_holds_the_state_any_more_the_newest_checkpoint_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "adashard.membership")
    with cluster_of(2, tmp_path, leases=QUICK) as cluster:
        with join(cluster, filled(MODEL, 0)) as crew:
            step(crew, 0, 2)
            save(cluster)
            weights = crew.weights()
            step(crew, 2, 4)
        for shard in range(2):
            cluster.kill_shard(shard)
        for shard in range(2):
            cluster.restart_shard(shard)
        with join(cluster, filled(MODEL, 1)) as crew:
            assert same(crew.weights(), weights)
    assert caplog.text.count("going on from checkpoint step-3, at step 3") == 1
