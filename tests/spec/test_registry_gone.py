"""What a coordinator knows may be gone, for a while or for good: steps go on, no job is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest
import torch
from tests.cluster.conftest import RedisServer, start_redis
from tests.spec.conftest import Bench, Feed, together

from adashard_server import LocalCluster
from adashard_server.cluster import redis_registry
from adashard_server.cluster.leases import LeaseSettings
from adashard_server.rpc import registry_calls

LEASES = LeaseSettings(lease_s=10.0, grace_s=0.3, renew_s=0.1, replace_after_s=1.0)
GRADIENT = {"weight": torch.ones(3, 4)}


class Pair:
    """A worker that trains, and one that wants to join it."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.bench = Bench(cluster, "job")
        feeds = [Feed({"weight": torch.full((3, 4), float(seed))}) for seed in (1, 2)]
        self.old, self.new = (self.bench.adafactor(feed.named()) for feed in feeds)
        for feed in feeds:
            feed.give(GRADIENT)
        self._joined = threading.Event()

    def join(self) -> None:
        """The second worker joins, steps and leaves, while the first goes on."""
        together(self._take_part, self._go_on)

    def _take_part(self) -> None:
        self.new.step()  # adopts
        self.new.step()
        self.new.close()
        self._joined.set()

    def _go_on(self) -> None:
        while not self._joined.is_set():
            self.old.step()

    def close(self) -> None:
        for optimizer in (self.old, self.new):
            optimizer.close()


def test_a_coordinator_that_lost_its_registry_goes_on_from_what_its_members_know():
    with LocalCluster(2, in_process=True, leases=LEASES) as cluster:
        pair = Pair(cluster)
        pair.old.step()
        cluster.kill_coordinator()
        for _ in range(3):
            pair.old.step()  # a step does not pass through the coordinator
        cluster.restart_coordinator()
        pair.join()
        assert pair.old.global_step >= 6
        assert pair.bench.get("/api/v1/jobs/job")["generation"] > 1
        pair.close()


def test_a_coordinator_dies_again_and_again_and_no_step_waits_for_it():
    with LocalCluster(1, in_process=True, leases=LEASES) as cluster:
        pair = Pair(cluster)
        for step in range(1, 4):
            pair.old.step()
            cluster.kill_coordinator()
            pair.old.step()
            cluster.restart_coordinator()
            assert pair.old.global_step == 2 * step
        pair.close()


@pytest.fixture
def redis(request, tmp_path, monkeypatch) -> Iterator[RedisServer]:
    """A Redis that answers soon or not at all; the test says whether it keeps its data."""
    monkeypatch.setattr(redis_registry, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(registry_calls, "RETRY_S", 0.1)
    server = start_redis(tmp_path, durable=request.param)
    yield server
    server.stop()


def written(redis: RedisServer) -> list[str]:
    """The names of the events in the registry: those of its absence are written late."""
    registry = redis_registry.RedisRegistry(redis.url)
    names = [event.name for event in registry.events()]
    registry.close()
    return names


@pytest.mark.processes
@pytest.mark.needs("redis-server")
@pytest.mark.parametrize(
    ("redis", "away", "back"),
    [
        (True, RedisServer.stop, RedisServer.start),
        (False, RedisServer.stop, RedisServer.start),
        (True, RedisServer.pause, RedisServer.resume),
    ],
    ids=["killed", "killed and emptied", "stopped"],
    indirect=["redis"],
)
def test_while_redis_is_away_steps_go_on_and_joins_wait_and_all_is_well_afterwards(
    redis, caplog, away, back
):
    caplog.set_level("INFO", "adashard")
    with LocalCluster(1, in_process=True, leases=LEASES, registry=redis.url) as cluster:
        pair = Pair(cluster)
        pair.old.step()
        away(redis)

        def return_when_that_was_noticed() -> None:
            while "changes of membership wait until the registry is back" not in caplog.text:
                pass
            ready = httpx.get(f"{cluster.url}/readyz", trust_env=False)
            assert ready.status_code == 503
            assert "redis" in ready.text
            back(redis)

        together(pair.join, return_when_that_was_noticed)
        pair.bench.until(lambda: written(redis)[-1:] == ["left"])
        assert written(redis).count("registry_gone") == 1
        assert written(redis).count("registry_back") == 1
        assert httpx.get(f"{cluster.url}/readyz", trust_env=False).status_code == 200
        pair.close()
