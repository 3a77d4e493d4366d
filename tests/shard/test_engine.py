"""The engine: sums and replies, on real threads and tensors."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.scenes import SPEC, alone, equal, in_rank_order, opened, values
from tests.shard.tables import (
    alive,
    piece,
    push,
    talked,
    together,
    watched,
)

from adashard.wire.errors import InvalidFrame, InvalidRequest, StaleGeneration
from adashard.wire.messages import Outcome, Run, UploadBegin
from adashard.wire.spec import DType
from adashard_server.shard import engine as engine_module

# --- sums ----------------------------------------------------------------------------------------

borders = st.lists(st.integers(1, 11), max_size=3)


@given(borders, borders, st.sampled_from([1, 2, 3]), st.booleans(), st.sampled_from([0, 20, 999]))
def test_pushes_of_two_threads_give_the_bits_of_their_sum_in_rank_order(
    first, second, shards, turned, room
):
    table = opened([f"s{n}" for n in range(shards)], workers="ab", early_bytes_max=room)
    gradients, shares = (values(1), values(2, scale=1e4)), (0.5, 1.5)
    expected = alone(in_rank_order(*gradients, shares=shares))

    def worker(rank: int, cuts: list[int]):
        begin = jobs.begin(table.entry, "ab"[rank], version=0, share=shares[rank])
        return lambda: table.step(begin, gradients[rank], cuts)

    actions = [worker(0, first), worker(1, second)]
    replies = together(*(reversed(actions) if turned else actions))
    for reply in replies:
        assert equal(reply.weights, expected)
    assert replies[0].record == replies[1].record


def test_a_higher_rank_that_comes_first_waits_for_its_turn():
    table = opened(workers="ab", early_bytes_max=0)
    engine = table.engine()
    order: list[str] = []
    first, second = (jobs.begin(table.entry, worker) for worker in "ab")
    engine.begin(second)

    def late():
        push(engine, second, values(2))
        order.append("b")

    def early(waits):
        waits.one()
        order.append("a")
        engine.begin(first)
        push(engine, first, values(1))

    with watched(engine) as waits:
        together(late, lambda: early(waits))
    assert order == ["a", "b"]
    reply = talked(table.shards["s0"], first)
    assert equal(reply.weights, alone(in_rank_order(values(1), values(2), shares=(1.0, 1.0))))


def test_gradients_of_every_format_are_summed_in_float32():
    table = opened()
    engine = table.engine()
    begin = jobs.begin(table.entry, "a", version=0)
    engine.begin(begin)
    for index, (gradient, dtype, wire) in enumerate(
        zip(
            values(1).values(),
            (torch.bfloat16, torch.float16, torch.float64),
            (DType.BFLOAT16, DType.FLOAT16, DType.FLOAT64),
            strict=True,
        )
    ):
        narrow = gradient.reshape(-1).to(dtype)
        run = Run(slice=index, start=0, count=narrow.numel(), dtype=wire)
        engine.push(begin, run, memoryview(narrow.view(torch.uint8).numpy()), alive)
    rounded = {
        index: gradient.to(dtype).float()
        for (index, gradient), dtype in zip(
            values(1).items(), (torch.bfloat16, torch.float16, torch.float64), strict=True
        )
    }
    assert equal(talked(table.shards["s0"], begin).weights, alone(rounded))


def test_a_push_that_was_broken_off_goes_on_where_it_was():
    table = opened()
    engine = table.engine()
    begin = jobs.begin(table.entry, "a", version=0)
    engine.begin(begin)
    engine.push(begin, *piece(0, values(1)[0], 0, 7), alive)
    again = dataclasses.replace(begin)
    reply = talked(table.shards["s0"], again, values(1), borders=[4, 9])
    assert equal(reply.weights, alone(values(1)))


def test_a_newer_stream_of_a_worker_ends_the_older_wherever_it_waits():
    table = opened(workers="ab", early_bytes_max=0)
    engine, (older, newer) = table.engine(), (jobs.begin(table.entry, "b") for _ in range(2))
    engine.begin(older)

    def stale():
        with pytest.raises(StaleGeneration, match="a newer stream of worker b"):
            push(engine, older, values(2))
        with pytest.raises(StaleGeneration, match="a newer stream of worker b"):
            engine.wait_decided(older, alive)

    def take_over(waits):
        waits.one()
        engine.begin(newer)

    with watched(engine) as waits:
        together(stale, lambda: take_over(waits))


def test_a_stream_that_waits_for_the_round_ends_with_a_newer_one():
    table = opened(workers="ab")
    engine, (older, newer) = table.engine(), (jobs.begin(table.entry, "a") for _ in range(2))
    engine.begin(older)
    push(engine, older, values(1))

    def stale():
        with pytest.raises(StaleGeneration, match="a newer stream"):
            engine.wait_decided(older, alive)

    def take_over(waits):
        waits.one()
        assert engine.begin(newer).complete

    with watched(engine) as waits:
        together(stale, lambda: take_over(waits))


def test_who_waits_for_others_notices_that_its_caller_has_gone(monkeypatch):
    monkeypatch.setattr(engine_module, "_LOOK_UP_S", 0.001)
    table = opened(workers="ab", early_bytes_max=0)
    engine, begin = table.engine(), jobs.begin(table.entry, "b")
    engine.begin(begin)
    with pytest.raises(StaleGeneration, match="the caller has gone"):
        engine.push(begin, *piece(0, values(2)[0]), lambda: False)
    with pytest.raises(StaleGeneration, match="the caller has gone"):
        engine.wait_decided(begin, lambda: False)
    engine.freeze(jobs.entry(SPEC, generation=2, workers="ab"))
    upload = UploadBegin(job=jobs.JOB, generation=2, sender="a", receiver="s0", version=0)
    with pytest.raises(StaleGeneration, match="the caller has gone"):
        engine.upload(upload, lambda: False)


def test_nothing_of_a_refused_push_is_applied():
    table = opened()
    engine, begin = table.engine(), jobs.begin(table.entry, "a", version=0)
    engine.begin(begin)
    with pytest.raises(InvalidFrame):
        engine.push(begin, *piece(0, values(9)[0], 3, 7), alive)
    with pytest.raises(InvalidFrame):
        engine.push(begin, Run(slice=7, start=0, count=1, dtype=DType.FLOAT32), bytes(4), alive)
    with pytest.raises(InvalidRequest):
        engine.begin(jobs.begin(table.entry, "a", step=9))
    reply = talked(table.shards["s0"], begin, values(1))
    assert equal(reply.weights, alone(values(1)))


# --- replies -------------------------------------------------------------------------------------


def test_a_pull_of_the_first_version_carries_weights():
    """They were once said to be unchanged, although the worker held none of the job's."""
    table = opened()
    reply = table.step(jobs.begin(table.entry, "a", 0, push=False), {})
    assert equal(reply.weights, values(0))
    assert reply.unchanged == []
    assert reply.record is None
    assert reply.acknowledge.complete


def test_a_worker_that_holds_the_version_before_gets_only_what_has_changed():
    table = opened()
    begin = jobs.begin(table.entry, "a", present=[1], version=0)
    reply = table.step(begin, {1: values(1)[1]})
    assert (reply.unchanged, list(reply.weights)) == ([0, 2], [1])
    assert equal(reply.weights, {1: alone(values(1))[1]})


def test_a_worker_that_holds_less_gets_all_that_it_asks_for():
    table = opened()
    table.step(jobs.begin(table.entry, "a", present=[1], version=0), {1: values(1)[1]})
    for version in (-1, 1):
        begin = jobs.begin(table.entry, "a", 1, push=False, version=version, slices=(0, 2))
        reply = table.step(begin, {})
        assert equal(reply.weights, {index: values(0)[index] for index in (0, 2)})


def test_weights_come_back_in_the_format_that_is_asked_for_rounded_once():
    table = opened()
    masters = table.step(jobs.begin(table.entry, "a", version=0), values(1)).weights
    dtypes = (DType.BFLOAT16, DType.FLOAT32, DType.FLOAT16)
    reply = table.step(jobs.begin(table.entry, "a", 1, push=False, dtypes=dtypes), {})
    assert equal(reply.weights, {0: masters[0].bfloat16(), 1: masters[1], 2: masters[2].half()})
    wide = jobs.begin(table.entry, "a", 1, push=False, dtypes=(DType.FLOAT64,))
    assert equal(table.step(wide, {}).weights, {i: one.double() for i, one in masters.items()})


def test_a_step_that_is_not_finite_changes_nothing_but_the_version():
    names = ("s0", "s1")
    table = opened(names)
    broken = {**values(1), 0: torch.full((4, 3), torch.inf)}
    reply = table.step(jobs.begin(table.entry, "a", version=0), broken)
    assert reply.record.outcome is Outcome.SKIP
    assert (sorted(reply.unchanged), reply.weights) == ([0, 1, 2], {})
    reply = table.step(jobs.begin(table.entry, "a", 2, version=1), values(1))
    assert equal(reply.weights, alone(values(1)))


def test_two_replies_at_once_apply_each_slice_once():
    table = opened(workers="ab")
    engine = table.engine()
    begins = [jobs.begin(table.entry, worker, version=0) for worker in "ab"]
    for begin, seed in zip(begins, (1, 2), strict=True):
        engine.begin(begin)
        push(engine, begin, values(seed))
    barrier = threading.Barrier(2)

    def reply(begin):
        barrier.wait()
        return talked(table.shards["s0"], begin)

    replies = together(*(lambda begin=begin: reply(begin) for begin in begins))
    expected = alone(in_rank_order(values(1), values(2), shares=(1.0, 1.0)))
    assert all(equal(one.weights, expected) for one in replies)


def test_a_worker_that_goes_on_while_others_still_read_settles_what_is_owed():
    table = opened()
    engine = table.engine()
    begin = jobs.begin(table.entry, "a", version=0)
    engine.begin(begin)
    push(engine, begin, values(1))
    reply = table.step(jobs.begin(table.entry, "a", 2, version=1), values(2))
    assert equal(reply.weights, alone(values(1), values(2)))
