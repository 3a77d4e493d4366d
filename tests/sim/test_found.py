"""What the simulator has found, each in the fewest events that show it."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from tests.shard import jobs
from tests.shard.clusters import Node

from adashard.wire.checksums import extended
from adashard.wire.control import Freeze, Frozen, Open, PlanRequest
from adashard.wire.errors import StaleGeneration
from adashard.wire.frames import read_frame
from adashard.wire.messages import Entry, Plan, Run, UploadBegin
from adashard.wire.placement import cut
from adashard.wire.spec import DType
from adashard.worker import Worker
from adashard_server.cluster.instructions import StepDown
from adashard_server.cluster.membership import Membership
from adashard_server.cluster.succession import Surroundings, waits_for_beginners
from adashard_server.shard.exchange import MemoryExchange
from adashard_server.shard.rounds import Rounds
from adashard_server.shard.shard import Shard

SPEC = jobs.spec((2,), (3,))


def generation(number: int, *workers: str) -> Entry:
    return jobs.entry(SPEC, generation=number, workers=workers or ("a",))


def test_a_step_that_was_decided_and_not_taken_by_any_slice_is_told_with_the_record_before_it():
    node = Node("s0")
    node.open(jobs.plan(generation(1)))
    node.push_all(jobs.begin(generation(1), "a"))
    node.settle()
    node.push_all(jobs.begin(generation(1), "a", 2))
    first, second = node.records
    answer = node.rounds.freeze(generation(2, "a", "b"))
    assert isinstance(answer, Frozen)
    assert (answer.versions, answer.record) == ((1, 1), first)
    node.rounds.plan(jobs.plan(generation(2, "a", "b"), 1, first))
    assert not node.rounds.owed
    assert node.rounds.version == 1
    assert node.rounds.record == first != second


def test_a_step_that_one_slice_has_taken_is_told_with_its_own_record():
    node = Node("s0")
    node.open(jobs.plan(generation(1)))
    node.push_all(jobs.begin(generation(1), "a"))
    node.rounds.applied(0)
    answer = node.rounds.freeze(generation(2))
    assert isinstance(answer, Frozen)
    assert (answer.versions, answer.record) == ((1, 0), node.records[0])


def test_no_slice_takes_a_step_between_the_answer_to_a_freeze_and_the_plan():
    node = Node("s0")
    node.open(jobs.plan(generation(1)))
    node.push_all(jobs.begin(generation(1), "a"))
    node.rounds.applied(0)
    assert node.rounds.owes(1)
    node.rounds.freeze(generation(2))
    assert not node.rounds.owes(1)
    node.rounds.plan(jobs.plan(generation(2), 1, node.records[0]))
    assert node.rounds.owes(1)


def test_an_upload_is_wanted_once():
    rounds = Rounds("s0")
    rounds.freeze(generation(1))
    rounds.plan(jobs.plan(generation(1)))
    assert rounds.lacks(0, 0)
    rounds.uploaded(0, 0)
    assert not rounds.lacks(0, 0)
    assert rounds.lacks(0, 1)


def test_a_worker_forgets_the_record_of_a_step_that_was_formed_again_without_it():
    worker = Worker("a", jobs.JOB)
    entry = generation(1)
    worker.freeze(entry)
    worker.open(jobs.plan(entry))
    node = Node("s0")
    node.open(jobs.plan(entry))
    node.push_all(jobs.begin(entry, "a"))
    worker.take_record(node.records[0], 1)
    again = generation(2, "a", "b")
    worker.freeze(again)
    worker.open(jobs.plan(again))
    other = Node("s0")
    other.open(jobs.plan(again))
    for name in ("a", "b"):
        other.push_all(jobs.begin(again, name))
    worker.take_record(other.records[0], 1)
    assert other.records[0] != node.records[0]


@pytest.mark.parametrize("moment", ["before the slice settles", "after it has settled"])
def test_a_slice_is_not_called_unchanged_at_a_step_that_a_freeze_has_undone(
    monkeypatch: pytest.MonkeyPatch, moment: str
):
    shard = Shard("s0", torch.device("cpu"), MemoryExchange(), time.monotonic, lambda _: None)
    plan = jobs.plan(generation(1), sources=True)
    open_with_zeros(shard, plan)
    begin = jobs.begin(generation(1), "a", present=(), version=0)
    engine = shard.begin(begin)
    engine.begin(begin)
    engine.wait_decided(begin, lambda: True)
    settle = engine._settle

    def frozen_meanwhile(index: int, *rest: object) -> None:
        if moment.startswith("before"):
            engine.freeze(generation(2))
        settle(index, *rest)
        engine.freeze(generation(2))

    monkeypatch.setattr(engine, "_settle", frozen_meanwhile)
    frames = engine.reply(begin, lambda: True)
    with pytest.raises(StaleGeneration):
        read_frame(next(frames))


def test_a_coordinator_that_never_wrote_hears_from_the_registry_that_another_has():
    membership = Membership(replace(generation(0), author=""), "late")
    assert membership.looked_up(None) == []
    told = membership.looked_up(replace(generation(2), author="other/1"))
    assert [type(one) for one in told] == [StepDown]


def test_a_job_that_is_restored_waits_for_no_more_shards_than_are_left():
    around = Surroundings(shards={"s0": "host:1"}, min_shards=2)
    begins = replace(generation(1), lineage=None, opened=False)
    assert waits_for_beginners(begins, around, ())
    assert not waits_for_beginners(replace(begins, opened=True), around, ())


def open_with_zeros(shard: Shard, plan: Plan) -> None:
    shard.handle(Freeze(entry=plan.entry))
    shard.handle(PlanRequest(plan=plan))
    begin = UploadBegin(job=jobs.JOB, generation=1, sender="a", receiver="s0", version=0)
    engine = shard.upload(begin)
    upload = engine.upload(begin, lambda: True)
    for piece in cut(SPEC):
        count = piece.element_count
        zeros = memoryview(bytes(4 * count))
        checksum = extended(0, zeros)
        run = Run(slice=piece.index, start=0, count=count, dtype=DType.FLOAT32, checksum=checksum)
        engine.upload_piece(upload, run, zeros)
    shard.handle(Open(plan=plan))
