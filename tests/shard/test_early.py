"""Frames that come before their turn: kept within a bound, then held back; nothing hangs."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.scenes import SPEC, equal, opened, values
from tests.shard.tables import Table, alive, piece, push, talked, together, watched

from adashard.wire.errors import StaleGeneration
from adashard.wire.messages import Begin, Run
from adashard.wire.spec import DType
from adashard_server.shard.early import EarlyRuns
from adashard_server.shard.engine import Engine
from adashard_server.shard.slices import SliceStore

# --- the buffer ----------------------------------------------------------------------------------


def early(sender: str = "b") -> Begin:
    return jobs.begin(jobs.entry(SPEC, workers="abc"), sender)


def numbered(index: int, start: int, count: int) -> tuple[Run, memoryview]:
    run, buffer = piece(index, torch.arange(float(start), float(start + count)))
    return dataclasses.replace(run, start=start), buffer


def test_runs_are_kept_in_the_order_of_each_worker_and_slice():
    kept = EarlyRuns()
    for sender, index, start in (("b", 0, 0), ("c", 0, 0), ("b", 0, 4), ("b", 1, 0)):
        assert kept.put(early(sender), *numbered(index, start, 4))
    assert sorted(kept.slices) == [0, 1]
    assert [(one.begin.sender, one.run.start) for one in kept.first(0)] == [("b", 0), ("c", 0)]
    assert [kept.ahead(*at) for at in (("b", 0), ("c", 0), ("b", 1), ("c", 1))] == [8, 4, 4, 0]
    kept.added("b", 0, 3)
    assert kept.ahead("b", 0) == 8
    assert kept.first(0)[0].run.start == 0
    kept.added("b", 0, 4)
    assert [(one.begin.sender, one.run.start) for one in kept.first(0)] == [("b", 4), ("c", 0)]
    assert kept.first(0)[0].addend.tolist() == [4.0, 5.0, 6.0, 7.0]


def test_room_is_counted_in_bytes_and_comes_back():
    kept = EarlyRuns(bytes_max=32)
    assert kept.put(early(), *numbered(0, 0, 4))
    assert not kept.put(early("c"), *numbered(0, 0, 5))
    assert kept.put(early("c"), *numbered(1, 0, 4))
    assert not kept.put(early(), *numbered(0, 4, 1))
    kept.drop("b")
    assert kept.slices == [1]
    assert kept.put(early(), *numbered(0, 0, 4))
    kept.added("c", 1, 4)
    assert kept.put(early(), *numbered(0, 4, 4))
    kept.clear()
    assert kept.slices == []
    assert kept.put(early(), *numbered(0, 0, 8))


def test_a_run_that_waits_has_its_own_copy():
    kept = EarlyRuns()
    elements = bytearray(torch.ones(3).numpy().tobytes())
    run = Run(slice=0, start=0, count=3, dtype=DType.FLOAT32)
    kept.put(early(), run, memoryview(elements))
    elements[:] = bytes(12)
    assert kept.first(0)[0].addend.tolist() == [1.0, 1.0, 1.0]


# --- in an engine --------------------------------------------------------------------------------

SHARES = (0.5, 1.5, 0.25, 7.0)


def begins(table: Table, workers: str) -> list[Begin]:
    return [
        jobs.begin(table.entry, worker, version=0, share=share)
        for worker, share in zip(workers, SHARES, strict=False)
    ]


def in_turn(workers: str) -> dict[int, torch.Tensor]:
    """The weights after a step in which each worker has waited for the one before."""
    table = opened(workers=workers)
    for rank, begin in enumerate(begins(table, workers)):
        table.engine().begin(begin)
        push(table.engine(), begin, values(rank + 1))
    return talked(table.shards["s0"], begin).weights


def test_what_comes_early_is_added_by_the_thread_that_makes_it_its_turn():
    """The higher rank's thread has gone on: its frames are all sent."""
    table = opened(workers="ab")
    engine, (low, high) = table.engine(), begins(table, "ab")
    engine.begin(high)
    push(engine, high, values(2), borders=[2, 5])
    assert sorted(engine._early.slices) == [0, 1, 2]
    engine.begin(low)
    push(engine, low, values(1), borders=[3])
    assert engine._early.slices == []
    assert engine.version == 1
    assert equal(talked(table.shards["s0"], high).weights, in_turn("ab"))


def test_what_waits_for_a_worker_without_a_gradient_is_added_when_that_turns_out():
    table = opened(workers="ab")
    engine, (low, high) = table.engine(), begins(table, "ab")
    engine.begin(high)
    push(engine, high, values(2))
    engine.begin(dataclasses.replace(low, present=jobs.bits([], 3)))
    assert engine._early.slices == []
    assert engine.version == 1


def test_beyond_the_room_a_stream_is_held_back_until_there_is_some():
    table = opened(workers="ab", early_bytes_max=48)
    engine, (low, high) = table.engine(), begins(table, "ab")
    engine.begin(high)
    engine.push(high, *piece(0, values(2)[0]), alive)
    order: list[str] = []

    def held_back():
        engine.push(high, *piece(1, values(2)[1]), alive)
        engine.push(high, *piece(2, values(2)[2]), alive)
        order.append("high")

    def lowest(waits):
        waits.one()
        order.append("low")
        engine.begin(low)
        push(engine, low, values(1))

    with watched(engine) as waits:
        together(held_back, lambda: lowest(waits))
    assert order == ["low", "high"]
    assert equal(talked(table.shards["s0"], high).weights, in_turn("ab"))


@settings(max_examples=10)
@given(st.permutations("abcd"), st.sampled_from([0, 4, 24, 60]), st.integers(0, 2**32 - 1))
def test_no_order_of_four_workers_hangs_however_little_room_there_is(order, room, seed):
    """Each sends its slices in an order of its own, and begins its stream again on the way."""
    table = opened(workers="abcd", early_bytes_max=room)
    engine = table.engine()
    named = dict(zip("abcd", begins(table, "abcd"), strict=True))

    def work(worker: str):
        chooser = random.Random(f"{seed}{worker}")
        mine = list(values("abcd".index(worker) + 1).items())
        if chooser.random() < 0.5:
            broken_off = dataclasses.replace(named[worker])
            engine.begin(broken_off)
            if worker == "a":
                push(engine, broken_off, dict(mine[:1]))
        chooser.shuffle(mine)
        borders = chooser.choices(range(1, 12), k=2)
        return talked(table.shards["s0"], named[worker], dict(mine), borders)

    replies = together(*(lambda worker=worker: work(worker) for worker in order))
    expected = in_turn("abcd")
    assert all(equal(reply.weights, expected) for reply in replies)


def test_a_new_stream_of_a_worker_drops_what_waited_of_the_one_before():
    table = opened(workers="ab", early_bytes_max=48)
    engine, (low, high) = table.engine(), begins(table, "ab")
    engine.begin(high)
    engine.push(high, *piece(0, values(9)[0]), alive)
    again = dataclasses.replace(high)
    engine.begin(again)
    assert engine._early.slices == []
    with pytest.raises(StaleGeneration, match="a newer stream"):
        engine.push(high, *piece(1, values(9)[1]), alive)
    engine.push(again, *piece(0, values(2)[0]), alive)  # there is room for it again
    engine.begin(low)
    push(engine, low, values(1))
    for index in (1, 2):
        engine.push(again, *piece(index, values(2)[index]), alive)
    assert equal(talked(table.shards["s0"], again).weights, in_turn("ab"))


def test_a_freeze_drops_what_waited():
    """It is of streams that have ended, and its place in the order may be another."""
    table = opened(workers="abc")
    engine, high = table.engine(), begins(table, "abc")[2]
    engine.begin(high)
    push(engine, high, values(9))
    later = jobs.entry(SPEC, generation=2, workers="ab")
    table.open(jobs.plan(later))
    assert engine._early.slices == []
    for rank, begin in enumerate(begins(table, "ab")):
        engine.begin(begin)
        push(engine, begin, values(rank + 1))
    assert equal(talked(table.shards["s0"], begin).weights, in_turn("ab"))


def test_what_waits_goes_on_from_the_middle_of_a_sum():
    """Of a worker whose stream broke off after a part of it was added."""
    table = opened(workers="ab")
    engine, (low, high) = table.engine(), begins(table, "ab")
    engine.begin(low)
    engine.push(low, *piece(0, values(1)[0], 0, 5), alive)
    engine.begin(high)
    engine.push(high, *piece(0, values(2)[0], 0, 3), alive)
    again = dataclasses.replace(high)
    engine.begin(again)
    for start, stop in ((0, 2), (2, 8), (8, 12)):
        engine.push(again, *piece(0, values(2)[0], start, stop), alive)
    assert engine._early.ahead("b", 0) == 12
    push(engine, again, {index: values(2)[index] for index in (1, 2)})
    push(engine, low, values(1), borders=[5])
    assert equal(talked(table.shards["s0"], again).weights, in_turn("ab"))


def test_a_run_that_comes_while_the_one_before_it_is_added_waits_behind_it(monkeypatch):
    """It was once said to leave a gap: the one before waited no more, and was not yet added."""
    table = opened(workers="ab")
    engine, (low, high) = table.engine(), begins(table, "ab")
    engine.begin(high)
    engine.push(high, *piece(0, values(2)[0], 0, 4), alive)
    original = SliceStore.add

    def add(store, *arguments, first, **options):
        if not first:
            monkeypatch.setattr(SliceStore, "add", original)
            engine.push(high, *piece(0, values(2)[0], 4, 12), alive)
        return original(store, *arguments, first=first, **options)

    monkeypatch.setattr(SliceStore, "add", add)
    engine.begin(low)
    push(engine, low, values(1))
    push(engine, high, {index: values(2)[index] for index in (1, 2)})
    assert engine._early.slices == []
    assert equal(talked(table.shards["s0"], high).weights, in_turn("ab"))


def held(engine: Engine) -> int:
    return sum(one.addend.nbytes for i in engine._early.slices for one in engine._early.first(i))


def test_elements_that_have_come_are_not_kept_twice():
    table = opened(workers="ab")
    engine, high = table.engine(), begins(table, "ab")[1]
    engine.begin(high)
    for _ in range(2):
        engine.push(high, *piece(0, values(2)[0]), alive)
    assert held(engine) == 48
    assert len(engine._early._waiting[0]["b"]) == 1
