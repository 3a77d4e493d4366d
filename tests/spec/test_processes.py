"""Real processes: they start with a line, drain on SIGTERM, and leave nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest
import torch
from tests.spec.conftest import Feed, together

import adashard
from adashard.wire.errors import AdashardError
from adashard_server import LocalCluster
from adashard_server.cluster_local import ServerProcess

pytestmark = pytest.mark.processes

ADASHARD = (sys.executable, "-m", "adashard_server.cli")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_cluster_brings_back_what_dies_and_leaves_no_process_behind():
    with LocalCluster(2, spare=False) as cluster:
        pids = [process.pid for process in cluster.processes.values()]
        weights = {name: torch.ones(4, 4) for name in "ab"}  # one for each shard
        feed = Feed(weights)
        optimizer = adashard.Adafactor(feed.named(), address=cluster.address)
        feed.give(weights)
        optimizer.step()
        cluster.kill_shard(1)
        optimizer.step()
        cluster.wait_restarted("shard-1")
        cluster.kill_coordinator()
        optimizer.step()
        cluster.wait_restarted("coordinator")
        optimizer.close()  # which the next coordinator hears, on the ports of the one before
        pids += [process.pid for process in cluster.processes.values()]
        assert len(set(pids)) == 3 + 2
        assert cluster.failure is None
    assert not any(alive(pid) for pid in pids)


def test_processes_end_when_the_one_that_started_them_is_killed():
    script = """
from adashard_server import LocalCluster
cluster = LocalCluster(1).start()
print(*[process.pid for process in cluster.processes.values()], flush=True)
input()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.communicate()
    while any(alive(pid) for pid in pids):
        pass  # the test's own timeout is the limit


def test_sigterm_drains_a_shard_and_the_coordinator_and_both_exit_with_zero():
    cluster = LocalCluster(1, spare=False)
    with cluster:
        feed = Feed({"weight": torch.ones(4, 4)})
        optimizer = adashard.Adafactor(feed.named(), address=cluster.address)
        feed.give({"weight": torch.ones(4, 4)})
        optimizer.step()
        coordinator, shard = cluster.processes.values()
        shard.terminate()
        assert shard.wait() == 0
        cluster.restart_shard(0)  # one that was asked to end stays away until somebody does this
        optimizer.step()
        optimizer.close()
        coordinator.terminate()
        assert coordinator.wait() == 0


def test_a_round_in_flight_is_finished_before_a_drained_shard_ends(caplog):
    caplog.set_level("INFO", "adashard")
    with LocalCluster(1, spare=False) as cluster:
        feeds = [Feed({"weight": torch.ones(4, 4)}) for _ in range(2)]
        first, second = (
            adashard.Adafactor(feed.named(), address=cluster.address, min_workers=2)
            for feed in feeds
        )
        for feed in feeds:
            feed.give({"weight": torch.ones(4, 4)})
        together(first.step, second.step)
        shard = cluster.processes["shard-0"]

        def second_after_the_drain_has_begun():
            while "step 2 waits for the other workers" not in caplog.text:
                pass
            shard.terminate()
            second.step()

        together(first.step, second_after_the_drain_has_begun)
        assert first.global_step == second.global_step == 2
        assert shard.wait() == 0


def test_up_runs_until_it_is_interrupted_and_status_tells_of_it():
    up = subprocess.Popen(
        [*ADASHARD, "up", "--shards", "2", "--port", "0", "--http-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        lines = [up.stdout.readline() for _ in range(3)]
        url = re.search(r"http://\S+", lines[2]).group()
        told = subprocess.run(
            [*ADASHARD, "status", "--format", "json", "--url", url],
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(told.stdout)
        assert [shard["status"] for shard in found["shards"]] == ["live", "live"]
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
    finally:
        up.send_signal(signal.SIGINT)
        assert up.wait(30) == 0
        up.stdout.close()


def test_an_error_at_the_start_is_told_with_its_remedy_and_exit_code_one():
    told = subprocess.run(
        [*ADASHARD, "status", "--url", "http://127.0.0.1:9"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 1
    assert told.stderr.startswith("CannotReachServer: no adashard REST at http://127.0.0.1:9")
    assert "adashard up" in told.stderr


def test_a_shard_without_a_coordinator_says_so_and_ends():
    process = ServerProcess("shard", {"coordinator": "127.0.0.1:9", "port": 0})
    with pytest.raises(AdashardError, match=r"no adashard server at 127\.0\.0\.1:9"):
        process.wait_ready()
    assert process.wait() == 1
