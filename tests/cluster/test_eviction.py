"""A member that lives and has to go: it counts as dead, and reads why."""

from __future__ import annotations

import pytest
from tests.cluster.scenes import announced, told
from tests.cluster.test_coordinator import LEASES, Bench, a_shard, a_worker

from adashard.wire.control import Bye, Notice, Renewal
from adashard.wire.errors import AdashardError, CannotReachServer, LeaseExpired, from_info
from adashard_server.cluster.coordinator import FOREVER
from adashard_server.cluster.instructions import Announce, HangUp, Swap

REASON = LeaseExpired("so it was decided")


def test_an_evicted_worker_is_told_why_and_the_job_goes_on_without_it():
    bench = Bench.opened("worker-0", "worker-1")
    said = bench.coordinator.evict("worker-1", REASON, bench.now)
    bye = told(said, Bye)["worker-1"]
    assert (bye.job, bye.generation) == ("job", FOREVER)
    assert from_info(bye.error).message == "so it was decided"
    assert HangUp("worker-1") in said
    assert announced(said) == ["evicted"]
    swap = next(one for one in bench.tick() if isinstance(one, Swap))
    assert [worker.id for worker in swap.entry.workers] == ["worker-0"]


def test_an_evicted_shard_is_dead_and_offers_no_room():
    bench = Bench.opened("worker-0")
    bench.hello(a_shard("shard-01"))
    bye = told(bench.coordinator.evict("shard-01", REASON, bench.now), Bye)["shard-01"]
    assert bye.job == "", "its process ends, whatever it holds"
    around = bench.coordinator._surroundings(bench.now)
    assert "shard-01" in around.dead
    assert "shard-01" not in around.shards
    assert "shard-01" not in around.silent, "it is not merely slow"


def test_whoever_was_evicted_is_not_let_in_again_and_not_evicted_twice():
    bench = Bench.opened("worker-0")
    bench.coordinator.evict("worker-0", REASON, bench.now)
    assert bench.coordinator.evict("worker-0", REASON, bench.now) == []
    bench.says("worker-0", Renewal())
    with pytest.raises(AdashardError) as raised:
        bench.hello(a_worker("worker-0", generation=1))
    assert raised.value is REASON
    assert bench.coordinator.evict("nobody", REASON, bench.now) == []


def test_of_two_that_do_not_reach_each_other_one_is_evicted():
    bench = Bench.opened("worker-0", "worker-1")
    bench.says("worker-1", Renewal(broken_links=("shard-00", "somebody")))
    (evicted,) = (
        one for one in bench.tick() if isinstance(one, Announce) and one.name == "evicted"
    )
    assert "worker worker-1 is evicted" in evicted.text
    assert f"{LEASES.lease_s * 3:g} s" in evicted.text
    assert not any(announced([one]) == ["evicted"] for one in bench.tick())


def test_a_link_that_is_whole_again_is_forgotten():
    bench = Bench.opened("worker-0")
    bench.says("worker-0", Renewal(broken_links=("shard-00",)), Renewal())
    assert "evicted" not in announced(bench.tick())


def test_a_member_is_silent_while_its_stream_stands_and_not_after_it_broke():
    bench = Bench.opened("worker-0")
    bench.tick(LEASES.lease_s + 1.0)
    assert bench.coordinator._surroundings(bench.now).silent == {"worker-0", "shard-00"}
    bench.coordinator.detached("worker-0", bench.now)
    assert bench.coordinator._surroundings(bench.now).silent == {"shard-00"}


# --- a registry that does not answer -------------------------------------------------------------


def test_those_who_wait_for_the_registry_hear_that_it_is_away():
    bench = Bench.opened("worker-0")
    bench.hello(a_worker("worker-1"))
    assert any(isinstance(one, Swap) for one in bench.tick())
    said = bench.coordinator.registry_gone(CannotReachServer("nobody answers at redis"))
    assert announced(said) == ["registry_gone"]
    assert told(said, Notice).keys() == {"worker-0", "worker-1"}
    notice = told(bench.coordinator.hello(a_worker("worker-2"), bench.now), Notice)["worker-2"]
    assert "nobody answers at redis" in notice.text
    assert "nobody answers at redis" in bench.view().cluster_statistics().not_ready
    assert announced(bench.coordinator.registry_back()) == ["registry_back"]
    assert told(bench.coordinator.hello(a_worker("worker-3"), bench.now), Notice) == {}
    assert bench.view().cluster_statistics().not_ready == ()


def test_whom_the_registry_does_not_concern_hears_nothing_of_it():
    bench = Bench.opened("worker-0")
    said = bench.coordinator.registry_gone(CannotReachServer("nobody answers at redis"))
    assert told(said, Notice) == {}
