"""A cluster whose registry is a real Redis: its coordinator may die and come back."""

from __future__ import annotations

import threading

import pytest
import torch
from tests.cluster.conftest import start_redis
from tests.spec.conftest import Feed, free_port, together

import adashard
from adashard_server.cluster_local import ServerProcess

pytestmark = [pytest.mark.processes, pytest.mark.needs("redis-server")]


def coordinator(port: int, registry: str) -> ServerProcess:
    options = {"port": port, "http-port": 0, "registry": registry, "min-shards": 1}
    process = ServerProcess("coordinator", options)
    process.wait_ready()
    return process


@pytest.fixture
def redis_url(tmp_path):
    server = start_redis(tmp_path)
    yield server.url
    server.stop()


def test_steps_go_on_without_the_coordinator_and_joins_wait_until_it_is_back(redis_url):
    port = free_port()
    address = f"127.0.0.1:{port}"
    first = coordinator(port, redis_url)
    shard = ServerProcess("shard", {"coordinator": address, "port": 0})
    shard.wait_ready()
    gradient = {"weight": torch.ones(3, 4)}
    feeds = [Feed({"weight": torch.full((3, 4), float(seed))}) for seed in (1, 2)]
    old, new = (adashard.Adafactor(feed.named(), address=address) for feed in feeds)
    for feed in feeds:
        feed.give(gradient)
    left = threading.Event()
    try:
        old.step()
        first.kill()
        for _ in range(3):
            old.step()  # a step does not pass through the coordinator
        assert old.global_step == 4
        first = coordinator(port, redis_url)

        def join() -> None:
            new.step()  # adopts
            assert new.global_step >= 4
            new.step()
            new.close()

            left.set()

        def go_on() -> None:
            while not left.is_set():
                old.step()

        together(join, go_on)
        assert old.global_step >= 5
        old.close()
    finally:
        shard.stop()
        first.stop()
