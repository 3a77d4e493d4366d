"""The engine through changes of generation: nothing is lost, nothing torn."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from tests.shard import jobs
from tests.shard.scenes import SPEC, alone, equal, in_rank_order, opened, values
from tests.shard.tables import (
    Table,
    alive,
    piece,
    push,
    read,
    talked,
    together,
    watched,
)

from adashard.wire.control import Freeze, Open, PlanRequest
from adashard.wire.errors import InvalidFrame, StaleGeneration
from adashard.wire.messages import Run, UploadBegin
from adashard.wire.spec import DType
from adashard_server.shard.engine import Engine
from adashard_server.shard.slices import SliceStore

# --- changes of generation -----------------------------------------------------------------------


def big_table(**options):
    """Slices of a frame each, so that a reply can be stopped between any two."""
    spec = jobs.spec((1 << 18,), (1 << 18,), (3,))
    table = Table()
    weights = {0: torch.ones(1 << 18), 1: torch.full((1 << 18,), 2.0), 2: torch.ones(3)}
    table.open(jobs.plan(jobs.entry(spec, **options)), weights)
    gradients = {0: torch.linspace(-1, 1, 1 << 18), 1: torch.ones(1 << 18), 2: torch.ones(3)}
    return table, spec, gradients


@pytest.mark.parametrize("frames", [0, 1, 2, 3])
def test_a_freeze_in_the_middle_of_a_reply_loses_nothing(frames):
    table, spec, gradients = big_table()
    undisturbed, _, _ = big_table()
    expected = undisturbed.step(jobs.begin(undisturbed.entry, "a", version=0), gradients)
    engine = table.engine()
    begin = jobs.begin(table.entry, "a", version=0)
    engine.begin(begin)
    push(engine, begin, gradients)
    record = engine.wait_decided(begin, alive)
    reply = engine.reply(begin, alive)
    for _ in range(frames):
        next(reply)

    later = jobs.entry(spec, generation=2)
    (frozen,) = table.freeze(later)
    if frames < 3:
        with pytest.raises(StaleGeneration):
            list(reply)
    assert table.freeze(later) == [frozen], "it went on applying while frozen"
    seen = max(frozen.versions)
    assert frozen.record == (record if seen else None)
    table.open(jobs.plan(later, base=seen, record=frozen.record))
    if seen:
        again = table.step(jobs.begin(later, "a", 1, push=False), {})
    else:
        again = table.step(jobs.begin(later, "a", version=0), gradients)
    assert equal(again.weights, expected.weights)
    assert again.record == expected.record
    onward = [
        one.step(jobs.begin(one.entry, "a", 2, version=1), gradients).weights
        for one in (table, undisturbed)
    ]
    assert equal(*onward)


def test_a_freeze_waits_until_no_slice_is_worked_on(monkeypatch):
    """What it answers holds: also a sum is neither added to nor measured after it."""
    table = opened()
    engine = table.engine()
    later = jobs.entry(SPEC, generation=2)
    happened: list[str] = []
    threads: list[threading.Thread] = []
    original = SliceStore.measure

    def freeze(waits):
        engine.freeze(later)
        happened.append("frozen")
        waits.began.release()

    def measured(*arguments):
        thread = threading.Thread(target=freeze, args=(waits,), daemon=True)
        thread.start()
        threads.append(thread)
        waits.one()
        happened.append("measured")
        monkeypatch.setattr(SliceStore, "measure", original)
        return original(*arguments)

    monkeypatch.setattr(SliceStore, "measure", measured)
    begin = jobs.begin(table.entry, "a", present=[0])
    with watched(engine) as waits:
        engine.begin(begin)
        push(engine, begin, {0: values(1)[0]})
        threads[0].join(60)
    assert happened == ["measured", "frozen"]


def test_what_was_to_be_measured_before_a_change_is_not_measured_after_it(monkeypatch):
    """Its slice may be elsewhere by then, or its sum be formed anew."""
    table = opened(("s0", "s1"), placement=(0, 0, 0), workers="ab")
    engine = table.engine()
    moved = dataclasses.replace(table.entry, generation=2, placement=(0, 1, 1))

    def then_change(engine, index, measure):
        monkeypatch.undo()
        instructions = engine._measure(index, measure)
        table.open(jobs.plan(moved), values(0))
        return instructions

    monkeypatch.setattr(Engine, "_measure", then_change)
    first, last = jobs.begin(table.entry, "a"), jobs.begin(table.entry, "b", present=[])
    engine.begin(first)
    push(engine, first, values(1))
    engine.begin(last)
    assert table.entry == moved
    replies = together(
        lambda: table.step(jobs.begin(moved, "a", version=0), values(1)),
        lambda: table.step(jobs.begin(moved, "b", version=0, present=[]), {}),
    )
    zeros = {index: torch.zeros_like(one) for index, one in values(1).items()}
    expected = alone(in_rank_order(values(1), zeros, shares=(1.0, 1.0)))
    assert all(equal(reply.weights, expected) for reply in replies)


def test_sums_that_still_hold_after_a_change_are_not_sent_again():
    table = opened(workers="ab")
    engine = table.engine()
    first = jobs.begin(table.entry, "a")
    engine.begin(first)
    push(engine, first, values(1))
    later = jobs.entry(SPEC, generation=2, workers="abc")
    table.open(jobs.plan(later))
    engine = table.engine()
    assert engine.begin(jobs.begin(later, "a")).complete
    for worker, seed, share in (("b", 2, 1.0), ("c", 3, 2.0)):
        begin = jobs.begin(later, worker, version=0, share=share)
        engine.begin(begin)
        push(engine, begin, values(seed))
    reply = talked(table.shards["s0"], jobs.begin(later, "a"))
    expected = alone(in_rank_order(values(1), values(2), values(3), shares=(1.0, 1.0, 2.0)))
    assert equal(reply.weights, expected)


def test_a_worker_that_dies_half_way_releases_the_others():
    table = opened(workers="ab", early_bytes_max=0)
    engine = table.engine()
    later = jobs.entry(SPEC, generation=2, workers="b")
    opened_again = threading.Event()
    dead, alive_one = (jobs.begin(table.entry, worker) for worker in "ab")
    engine.begin(dead)
    engine.push(dead, *piece(0, values(9)[0], 0, 5), alive)
    engine.begin(alive_one)

    def change(waits):
        waits.one()
        table.open(jobs.plan(later))
        opened_again.set()

    def survivor():
        with pytest.raises(StaleGeneration):
            push(engine, alive_one, values(1))
        assert opened_again.wait(60)
        return table.step(jobs.begin(later, "b", version=0), values(1))

    with watched(engine) as waits:
        _, reply = together(lambda: change(waits), survivor)
    assert equal(reply.weights, alone(values(1)))


def test_an_upload_that_arrives_before_the_plan_waits_for_it():
    """It was once taken at once, and dropped when the plan came."""
    table = Table()
    plan = jobs.plan(jobs.entry(SPEC), sources=True)
    table.freeze(plan.entry)
    (shard,) = table.shards.values()

    def give_plan(waits):
        waits.one()
        assert shard.handle(PlanRequest(plan=plan)) is None

    with watched(table.engine()) as waits:
        together(lambda: table.upload(shard, plan, values(0)), lambda: give_plan(waits))
    assert [planned.generation for planned in table.told] == [1]
    shard.handle(Open(plan=plan))
    table.entry = plan.entry
    reply = table.step(jobs.begin(plan.entry, "a", 0, push=False), {})
    assert equal(reply.weights, values(0))


def test_an_upload_that_waits_is_refused_when_its_generation_is_over():
    table = Table()
    first = jobs.plan(jobs.entry(SPEC), sources=True)
    table.freeze(first.entry)
    (shard,) = table.shards.values()

    def upload():
        with pytest.raises(StaleGeneration, match="an upload of generation 1"):
            table.upload(shard, first, values(0))

    def change(waits):
        waits.one()
        table.freeze(jobs.entry(SPEC, generation=2))

    with watched(table.engine()) as waits:
        together(upload, lambda: change(waits))


def uploading(table: Table, plan):
    begin = UploadBegin(
        job=jobs.JOB, generation=plan.entry.generation, sender="a", receiver="s0", version=0
    )
    return table.engine().upload(begin, alive)


def test_an_upload_that_is_repeated_when_its_shard_has_all_tears_nothing():
    table = Table()
    plan = jobs.plan(jobs.entry(SPEC), sources=True)
    table.freeze(plan.entry)
    table.plan(plan)
    table.upload(table.shards["s0"], plan, values(0))
    upload = uploading(table, plan)
    table.engine().upload_piece(upload, *piece(0, values(0)[0], 0, 3))
    table.open(plan)
    with pytest.raises(StaleGeneration):
        table.engine().upload_piece(upload, *piece(0, values(0)[0], 3, 12))
    reply = table.step(jobs.begin(plan.entry, "a", 0, push=False), {})
    assert equal(reply.weights, values(0))


def test_two_uploads_of_a_slice_at_once_do_not_write_into_each_other():
    table = Table()
    plan = jobs.plan(jobs.entry(SPEC), sources=True)
    table.freeze(plan.entry)
    table.plan(plan)
    engine = table.engine()
    older, newer = uploading(table, plan), uploading(table, plan)
    engine.upload_piece(older, *piece(0, values(0)[0], 0, 6))
    engine.upload_piece(newer, *piece(0, values(0)[0], 0, 3))
    engine.upload_piece(older, *piece(0, values(0)[0], 6, 12))
    engine.upload_piece(older, *piece(1, values(0)[1]))
    assert engine.upload_piece(older, *piece(2, values(0)[2]))
    assert engine.upload_piece(newer, *piece(0, values(0)[0], 3, 12))
    table.open(plan)
    reply = table.step(jobs.begin(plan.entry, "a", 0, push=False), {})
    assert equal(reply.weights, values(0))


@pytest.mark.parametrize(
    ("run", "size"),
    [
        (Run(slice=3, start=0, count=1, dtype=DType.FLOAT32), 4),
        (Run(slice=0, start=1, count=1, dtype=DType.FLOAT32), 4),
        (Run(slice=0, start=0, count=13, dtype=DType.FLOAT32), 52),
    ],
    ids=["no such slice", "gap", "too long"],
)
def test_an_upload_that_does_not_fit_its_slice_is_refused(run, size):
    table = Table()
    plan = jobs.plan(jobs.entry(SPEC), sources=True)
    table.freeze(plan.entry)
    table.plan(plan)
    upload = uploading(table, plan)
    with pytest.raises(InvalidFrame):
        table.engine().upload_piece(upload, run, memoryview(bytes(size)))


def test_a_job_that_is_replaced_by_another_model_begins_anew():
    table = opened()
    table.step(jobs.begin(table.entry, "a", version=0), values(1))
    other = jobs.plan(jobs.entry(jobs.spec((2,)), generation=2, lineage=2))
    table.open(other, {0: torch.ones(2)})
    reply = table.step(jobs.begin(other.entry, "a", 0, push=False), {})
    assert equal(reply.weights, {0: torch.ones(2)})
    assert table.engine().holding().weight_bytes == 8


def test_a_shard_that_gains_and_loses_slices_drops_those_placed_elsewhere():
    table = opened(("s0", "s1"), placement=(0, 0, 0))
    held = table.engine().holding()
    assert held.weight_bytes == 4 * (12 + 5 + 1)
    assert held.state_bytes == {"row": 16, "column": 12, "vector": 24}
    moved = jobs.plan(jobs.entry(SPEC, generation=2, shards=("s0", "s1"), placement=(0, 1, 1)))
    table.open(moved, values(0))
    assert table.engine("s0").holding().weight_bytes == 48
    assert table.engine("s1").holding().weight_bytes == 24


def test_an_answer_to_an_old_freeze_is_a_refusal():
    table = opened(generation=3)
    answer = table.shards["s0"].handle(Freeze(entry=jobs.entry(SPEC, generation=2)))
    assert answer.promised == 3


def test_a_stream_of_frames_reads_back_as_it_was_cut():
    """The driver's own reading is checked against what was uploaded, frame by frame."""
    table, _, _ = big_table()
    engine = table.engine()
    begin = jobs.begin(table.entry, "a", 0, push=False)
    acknowledge = engine.begin(begin)
    frames = list(engine.reply(begin, alive))
    assert len(frames) == 3
    reply = read(acknowledge, None, iter(frames))
    assert [weight.numel() for weight in reply.weights.values()] == [1 << 18, 1 << 18, 3]
