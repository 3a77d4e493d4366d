"""Real threads and tensors: the bits of a step do not depend on who came when."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs
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

from adashard.wire.errors import InvalidFrame, InvalidRequest, StaleGeneration
from adashard.wire.messages import DType, Freeze, Open, Outcome, PlanRequest, Run, UploadBegin
from adashard_server.shard import engine as engine_module
from adashard_server.shard.slices import SliceStore

SPEC = jobs.spec((4, 3), (5,), ())


def values(seed: int, scale: float = 1.0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        index: scale * torch.randn(parameter.shape, generator=generator)
        for index, parameter in enumerate(SPEC.parameters)
    }


def opened(names=("s0",), **options) -> Table:
    """Shards that hold the weights of `values(0)` at version 0 and collect step 1."""
    table = Table(names)
    table.open(jobs.plan(jobs.entry(SPEC, shards=names, **options)), values(0))
    return table


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[index].reshape(-1), other[index].reshape(-1)) for index in one
    )


def in_rank_order(*gradients, shares):
    """The mean as a shard forms it: added in float32, one after the other, then divided."""
    total = {index: one * shares[0] for index, one in gradients[0].items()}
    for gradient, share in zip(gradients[1:], shares[1:], strict=True):
        for index, one in gradient.items():
            total[index].add_(one, alpha=share)
    return {index: one / sum(shares) for index, one in total.items()}


def alone(*steps) -> dict[int, torch.Tensor]:
    """The weights after these mean gradients, with one worker on one shard."""
    table = opened()
    for step, gradient in enumerate(steps, start=1):
        reply = table.step(jobs.begin(table.entry, "a", step, version=step - 1), gradient)
    return reply.weights


# --- sums ----------------------------------------------------------------------------------------

borders = st.lists(st.integers(1, 11), max_size=3)


@given(borders, borders, st.sampled_from([1, 2, 3]), st.booleans())
def test_pushes_of_two_threads_give_the_bits_of_their_sum_in_rank_order(
    first, second, shards, turned
):
    table = opened([f"s{n}" for n in range(shards)], workers="ab")
    gradients, shares = (values(1), values(2, scale=1e4)), (0.3, 2.0)
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
    table = opened(workers="ab")
    engine = table.engine()
    order: list[str] = []
    first, second = (jobs.begin(table.entry, worker) for worker in "ab")
    engine.begin(second)

    def late():
        push(engine, second, values(2))
        order.append("b")

    def early(waits):
        waits.one()
        engine.begin(first)
        push(engine, first, values(1))
        order.append("a")

    with watched(engine) as waits:
        together(late, lambda: early(waits))
    assert order[-1] == "b"
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
    table = opened(workers="ab")
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
    table = opened(workers="ab")
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
    original = SliceStore.squared_sum

    def freeze(waits):
        engine.freeze(later)
        happened.append("frozen")
        waits.began.release()

    def measured(store, index):
        thread = threading.Thread(target=freeze, args=(waits,), daemon=True)
        thread.start()
        threads.append(thread)
        waits.one()
        happened.append("measured")
        monkeypatch.setattr(SliceStore, "squared_sum", original)
        return original(store, index)

    monkeypatch.setattr(SliceStore, "squared_sum", measured)
    begin = jobs.begin(table.entry, "a", present=[0])
    with watched(engine) as waits:
        engine.begin(begin)
        push(engine, begin, {0: values(1)[0]})
        threads[0].join(60)
    assert happened == ["measured", "frozen"]


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
    for worker, seed in (("b", 2), ("c", 3)):
        begin = jobs.begin(later, worker, version=0)
        engine.begin(begin)
        push(engine, begin, values(seed))
    reply = talked(table.shards["s0"], jobs.begin(later, "a"))
    expected = alone(in_rank_order(values(1), values(2), values(3), shares=(1.0,) * 3))
    assert equal(reply.weights, expected)


def test_a_worker_that_dies_half_way_releases_the_others():
    table = opened(workers="ab")
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
    return begin, table.engine().upload(begin, alive)


def test_an_upload_that_is_repeated_when_its_shard_has_all_tears_nothing():
    table = Table()
    plan = jobs.plan(jobs.entry(SPEC), sources=True)
    table.freeze(plan.entry)
    table.plan(plan)
    table.upload(table.shards["s0"], plan, values(0))
    begin, upload = uploading(table, plan)
    table.engine().upload_piece(upload, begin, *piece(0, values(0)[0], 0, 3))
    table.open(plan)
    with pytest.raises(StaleGeneration):
        table.engine().upload_piece(upload, begin, *piece(0, values(0)[0], 3, 12))
    reply = table.step(jobs.begin(plan.entry, "a", 0, push=False), {})
    assert equal(reply.weights, values(0))


def test_two_uploads_of_a_slice_at_once_do_not_write_into_each_other():
    table = Table()
    plan = jobs.plan(jobs.entry(SPEC), sources=True)
    table.freeze(plan.entry)
    table.plan(plan)
    engine = table.engine()
    (begin, older), (_, newer) = uploading(table, plan), uploading(table, plan)
    engine.upload_piece(older, begin, *piece(0, values(0)[0], 0, 6))
    engine.upload_piece(newer, begin, *piece(0, values(0)[0], 0, 3))
    engine.upload_piece(older, begin, *piece(0, values(0)[0], 6, 12))
    engine.upload_piece(older, begin, *piece(1, values(0)[1]))
    assert engine.upload_piece(older, begin, *piece(2, values(0)[2]))
    assert engine.upload_piece(newer, begin, *piece(0, values(0)[0], 3, 12))
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
    begin, upload = uploading(table, plan)
    with pytest.raises(InvalidFrame):
        table.engine().upload_piece(upload, begin, run, memoryview(bytes(size)))


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
