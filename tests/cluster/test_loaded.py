"""A job that begins with a state that a worker has loaded: its lineage, plan and record."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cluster.scenes import SPEC, Scene, told

from adashard.wire.control import Hello, OnExisting, PlanRequest, ShardHello, WorkerHello
from adashard.wire.errors import JobExists
from adashard.wire.messages import Lineage, Outcome, Record, Source
from adashard.wire.version import VERSION
from adashard_server.cluster.coordinator import Coordinator
from adashard_server.cluster.instructions import Swap
from adashard_server.cluster.leases import LeaseSettings
from adashard_server.cluster.succession import FRESH, Start

A, B = "a" * 64, "b" * 64
TEN = Start(10, A)


def record(step: int = 10) -> Record:
    """Stands for the steps before the state."""
    return Record(
        step=step,
        workers=(),
        shares=(),
        outcome=Outcome.APPLY,
        present=b"\x00",
        step_counts=(9, 10, 0),
        groups=(),
    )


def scene(*offers: Start) -> Scene:
    """A new job that a worker for each offer waits to join."""
    made = Scene.begin()
    for number, offer in enumerate(offers):
        made.membership.join(f"w{number}", offer)
    return made


# --- who begins it -------------------------------------------------------------------------------


def test_the_lineage_has_the_version_and_the_fingerprint_of_its_origin():
    lineage = scene(TEN).swap().entry.lineage
    assert lineage == Lineage(number=1, origin="w0", base_version=10, fingerprint=A)


def test_of_those_that_have_loaded_it_the_lowest_rank_begins_and_before_fresh_ones():
    assert scene(FRESH, TEN, TEN).swap().entry.lineage.origin == "w1"
    assert scene(FRESH, FRESH).swap().entry.lineage == Lineage(number=1, origin="w0")


def test_a_worker_that_leaves_or_is_dead_begins_nothing():
    gone = scene(TEN, FRESH)
    gone.dead = frozenset({"w0"})
    assert gone.swap().entry.lineage == Lineage(number=1, origin="w1")


def test_what_the_job_will_begin_with_is_known_while_it_waits():
    waits = scene()
    assert waits.membership.start is None
    waits.membership.join("w0")
    assert waits.membership.start == FRESH
    waits.membership.join("w1", TEN)
    assert waits.membership.start == TEN
    waits.make_generation()
    waits.membership.join("w2", Start(3, B))
    assert waits.membership.start == TEN, "what it has begun with stays"


def test_the_offer_of_a_worker_that_has_gone_does_not_count():
    waits = scene(TEN, FRESH)
    waits.membership.joiners.remove("w0")
    assert waits.membership.start == FRESH


def test_a_lineage_that_never_opened_is_begun_by_the_next_that_has_loaded_it():
    first = scene(TEN, FRESH, TEN)
    first.swap()
    first.written()
    first.dead = frozenset({"w0"})
    first.swap()
    first.written()
    first.freeze()
    lineage = first.swap().entry.lineage
    assert (lineage.origin, lineage.base_version, lineage.fingerprint) == ("w2", 10, A)


# --- what it begins with -------------------------------------------------------------------------


def test_the_plan_begins_at_the_version_with_the_record_that_the_origin_has_made():
    made = scene(TEN, FRESH)
    made.base, made.record = 10, record()
    made.swap()
    made.written()
    plans = told(made.freeze(), PlanRequest)
    assert plans.keys() == {"w0", "w1", "shard-0", "shard-1"}
    plan = plans["shard-0"].plan
    assert (plan.base, plan.record) == (10, record())
    assert plan.sources == tuple(Source(slice=n, member="w0", version=10) for n in range(3))


def test_the_job_stands_at_that_version_as_soon_as_there_is_a_plan():
    made = scene(TEN)
    made.base, made.record = 10, record()
    made.make_generation()
    assert made.membership.version == 10


def test_a_job_that_begins_anew_forgets_what_others_have_offered():
    made = scene(TEN)
    made.make_generation()
    made.membership.restart(SPEC)
    made.membership.join("w9")
    lineage = made.swap().entry.lineage
    assert (lineage.base_version, lineage.fingerprint) == (0, "")


def test_a_job_can_begin_anew_from_an_older_version_than_it_has():
    made = scene(FRESH)
    made.make_generation()
    made.renew("shard-0", 15)
    made.membership.restart(SPEC)
    made.membership.join("w9", TEN)
    made.base, made.record = 10, record()
    assert made.swap().entry.lineage.base_version == 10
    made.written()
    assert told(made.freeze(), PlanRequest)["shard-0"].plan.base == 10


# --- through the coordinator ---------------------------------------------------------------------


def coordinator(*entries) -> Coordinator:
    made = Coordinator("c", entries, leases=LeaseSettings(), min_shards=1, token="", now=0.0)
    shard = ShardHello(address="shard-00:5000")
    made.hello(Hello(id="shard-00", version=VERSION, host="h", pid=1, shard=shard), 0.0)
    return made


def hello(member: str, start: Start = FRESH, **changes: object) -> Hello:
    worker = WorkerHello(job="job", spec=SPEC, version=start.version, fingerprint=start.fingerprint)
    worker = replace(worker, **changes)  # type: ignore[arg-type]
    return Hello(id=member, version=VERSION, host="h", pid=2, worker=worker)


def next_entry(made: Coordinator):
    return next(one.entry for one in made.tick(1.0) if isinstance(one, Swap))


def test_a_hello_brings_the_state_that_the_job_begins_with():
    made = coordinator()
    made.hello(hello("worker-0"), 0.0)
    made.hello(hello("worker-1", TEN), 0.0)
    lineage = next_entry(made).lineage
    assert (lineage.origin, lineage.base_version, lineage.fingerprint) == ("worker-1", 10, A)


def test_a_hello_with_another_state_is_refused():
    made = coordinator()
    made.hello(hello("worker-0", TEN), 0.0)
    with pytest.raises(JobExists, match=r"at step 10, .* of step 3"):
        made.hello(hello("worker-1", Start(3, B)), 0.0)
    assert made.jobs["job"].worker_ids() == {"worker-0"}


def test_a_job_is_replaced_by_the_state_of_the_one_that_asks():
    made = coordinator()
    made.hello(hello("worker-0", TEN), 0.0)
    made.jobs["job"].joiners.clear()
    made.hello(hello("worker-1", Start(3, B), on_existing=OnExisting.REPLACE), 0.0)
    lineage = next_entry(made).lineage
    assert (lineage.origin, lineage.base_version) == ("worker-1", 3)


def test_a_coordinator_that_began_anew_learns_again_what_its_workers_have_loaded():
    first = coordinator()
    first.hello(hello("worker-0", TEN), 0.0)
    entry = next_entry(first)
    second = coordinator(replace(entry, lineage=None))
    second.hello(hello("worker-0", TEN, generation=1), 0.0)
    assert second.jobs["job"].start == TEN
