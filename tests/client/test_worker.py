"""A worker's decisions, rule by rule: what it promises, holds, and may use."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs

from adashard.wire.control import Frozen, Stale, Standing
from adashard.wire.errors import Internal, InvalidFrame, StaleGeneration
from adashard.wire.messages import Entry, Lineage, Outcome, Record, Run
from adashard.wire.placement import cut
from adashard.wire.spec import DType
from adashard.worker import Worker

SPEC = jobs.spec((4,), (3,), ())
COUNTS = (4, 3, 1)


def new(name: str = "w") -> Worker:
    return Worker(name, jobs.JOB)


def entry(generation: int = 1, *, origin: str = "w", workers: str = "w", **options):
    return jobs.entry(SPEC, generation=generation, workers=workers, origin=origin, **options)


def record(step: int, count: int | None = None) -> Record:
    return Record(
        step=step,
        workers=("w",),
        shares=(1.0,),
        outcome=Outcome.APPLY,
        present=b"\x07",
        step_counts=((step if count is None else count),) * 3,
        groups=(jobs.group_step(),),
    )


def run(index: int, start: int = 0, count: int | None = None) -> Run:
    stop = COUNTS[index] if count is None else start + count
    return Run(slice=index, start=start, count=stop - start, dtype=DType.FLOAT32)


def receive(worker: Worker, step: int, *indices: int) -> None:
    """Whole slices at `step` arrive."""
    for index in indices or range(3):
        worker.writes(run(index))
        worker.wrote(run(index), step)


def opened(*, origin: str = "w", base: int = 0, of: Record | None = None, **options) -> Worker:
    worker = new()
    plan = jobs.plan(entry(origin=origin, **options), base, of)
    worker.freeze(plan.entry)
    assert worker.open(plan)
    return worker


def stepped(worker: Worker, step: int) -> Worker:
    worker.take_record(record(step), step)
    receive(worker, step)
    worker.took(worker.plan, step)
    return worker


# --- W1: its own initial weights are no copies, unless the lineage names it ----------------------


def test_a_worker_that_joins_holds_nothing_and_is_fresh():
    worker = new()
    frozen = worker.freeze(entry(lineage=0))
    assert frozen == Frozen(job=jobs.JOB, generation=1, fresh=True)
    assert (worker.version, worker.held([0, 1, 2])) == (-1, -1)


def test_the_origin_of_the_lineage_holds_its_first_version_in_every_slice():
    worker = new()
    frozen = worker.freeze(entry())
    assert frozen == Frozen(
        job=jobs.JOB,
        generation=1,
        lineage=1,
        slices=(0, 1, 2),
        versions=(0, 0, 0),
        complete=True,
    )
    assert (worker.version, worker.held([0, 1, 2])) == (0, 0)


def test_another_worker_s_lineage_makes_no_copies_of_this_one_s_weights():
    worker = new()
    frozen = worker.freeze(entry(origin="x"))
    assert frozen == Frozen(job=jobs.JOB, generation=1, fresh=True)


def test_a_lineage_that_names_it_a_second_time_finds_no_initial_weights():
    worker = stepped(opened(origin="x"), 0)
    frozen = worker.freeze(entry(2, lineage=2))
    assert (frozen.fresh, frozen.slices, worker.version) == (False, (), 0)


@pytest.mark.parametrize("written", ["a slice", "a piece"])
def test_weights_that_have_been_written_over_are_not_initial_any_more(written):
    """Not even in part, and not even before the step that wrote them is whole."""
    worker = opened(origin="x")
    worker.writes(run(0) if written == "a slice" else run(0, 0, 2))
    assert not worker.freeze(entry(2, origin="x")).fresh


def test_weights_that_were_there_already_are_initial_until_all_have_come():
    worker = opened(origin="x")
    assert worker.freeze(entry(2, origin="x")).fresh


def test_the_origin_holds_the_first_version_until_the_next():
    worker = opened()
    assert worker.freeze(entry(2)).slices == (0, 1, 2)
    worker.open(jobs.plan(entry(2)))
    stepped(worker, 1)
    frozen = worker.freeze(entry(3))
    assert (frozen.slices, frozen.complete, frozen.record) == ((), True, record(1))


def test_its_standing_is_what_it_has_promised_and_holds():
    worker = opened()
    worker.leaving = True
    assert worker.standing() == Standing(job=jobs.JOB, generation=1, version=0, leaving=True)
    assert worker.freeze(entry(2)).leaving


def test_its_rank_is_that_of_the_newest_generation():
    worker = new("b")
    assert worker.rank is None
    worker.freeze(entry(workers="ab"))
    assert worker.rank == 1
    worker.freeze(entry(2, workers="a"))
    assert worker.rank is None


# --- W2: promises --------------------------------------------------------------------------------


def test_a_repeated_freeze_gets_the_same_answer():
    worker = stepped(opened(), 1)
    assert worker.freeze(entry(2)) == worker.freeze(entry(2))


def test_an_older_freeze_is_told_of_the_promise():
    worker = opened()
    worker.freeze(entry(5))
    assert worker.freeze(entry(4)) == Stale(job=jobs.JOB, promised=5)
    assert (worker.promised, worker.entry.generation) == (5, 5)


def test_a_freeze_that_comes_again_after_the_open_closes_nothing():
    worker = opened()
    worker.freeze(entry())
    assert worker.plan is not None


@given(st.lists(st.tuples(st.sampled_from(["freeze", "open"]), st.integers(1, 5)), max_size=12))
def test_a_promise_is_never_taken_back(moves):
    worker, promised = new(), 0
    for move, generation in moves:
        if move == "freeze":
            answer = worker.freeze(entry(generation))
            assert isinstance(answer, Stale) == (generation < promised)
            promised = max(promised, generation)
        else:
            assert worker.open(jobs.plan(entry(generation))) == (generation == promised)
        assert worker.promised == promised
        assert worker.plan is None or worker.plan.entry.generation == promised


# --- W3: supplies --------------------------------------------------------------------------------


def test_it_supplies_what_the_plan_names_it_for():
    worker = new()
    plan = jobs.plan(entry(), sources=True)
    worker.freeze(plan.entry)
    assert worker.supplies(plan) == {0, 1, 2}
    some = dataclasses.replace(plan, sources=plan.sources[1:2])
    assert worker.supplies(some) == {1}


def test_it_supplies_nothing_to_others_plans_or_other_generations():
    worker = new()
    worker.freeze(entry())
    assert worker.supplies(jobs.plan(entry(origin="x"), sources=True)) == set()
    worker.freeze(entry(2))
    assert worker.supplies(jobs.plan(entry(), sources=True)) == set()


# --- W4: open ------------------------------------------------------------------------------------


def test_copies_of_another_lineage_are_dropped():
    worker = stepped(opened(), 1)
    worker.freeze(entry(2, lineage=2, origin="x"))
    worker.open(jobs.plan(entry(2, lineage=2, origin="x")))
    assert (worker.version, worker.record, worker.behind(range(3), 0)) == (-1, None, [0, 1, 2])
    assert worker.step_counts() == (0, 0, 0)


def test_copies_of_the_same_lineage_are_kept():
    worker = stepped(opened(), 1)
    worker.freeze(entry(2))
    worker.open(jobs.plan(entry(2), 1, record(1)))
    assert (worker.version, worker.behind(range(3), 1)) == (1, [])


def test_a_job_without_a_lineage_can_be_opened():
    worker = opened(lineage=0)
    assert worker.version == -1


def test_an_open_that_is_repeated_drops_nothing():
    worker = opened()
    worker.writes(run(0, 0, 2))
    assert worker.open(jobs.plan(entry()))
    worker.writes(run(0, 2, 2))
    worker.wrote(run(0, 2, 2), 1)
    assert worker.behind([0], 1) == []


def test_a_slice_that_was_torn_by_a_freeze_begins_anew():
    worker = opened()
    worker.writes(run(0, 0, 2))
    worker.freeze(entry(2))
    worker.open(jobs.plan(entry(2)))
    assert worker.held([0, 1]) == -1
    with pytest.raises(InvalidFrame):
        worker.writes(run(0, 2, 2))


# --- W6: what of a reply is used -----------------------------------------------------------------


def test_what_belongs_to_another_generation_is_refused():
    worker = opened()
    worker.check(1)
    for generation in (0, 2):
        with pytest.raises(StaleGeneration):
            worker.check(generation)
    worker.freeze(entry(2))
    for generation in (1, 2):
        with pytest.raises(StaleGeneration):
            worker.check(generation)


def test_a_slice_is_at_the_step_when_it_is_whole_and_torn_until_then():
    worker = opened()
    for start, count in ((0, 1), (1, 2), (3, 1)):
        worker.writes(run(0, start, count))
        worker.wrote(run(0, start, count), 1)
        assert worker.held([0]) == (1 if start + count == 4 else -1)
    assert worker.behind(range(3), 1) == [1, 2]


def test_a_reply_that_begins_again_writes_the_slice_anew():
    worker = opened()
    worker.writes(run(0, 0, 3))
    worker.wrote(run(0, 0, 3), 1)
    receive(worker, 1, 0)
    assert worker.held([0]) == 1


@pytest.mark.parametrize(
    "bad",
    [
        Run(slice=3, start=0, count=1, dtype=DType.FLOAT32),
        Run(slice=-1, start=0, count=1, dtype=DType.FLOAT32),
        run(0, 2, 2),
        run(0, 0, 5),
        run(1, 1, 1),
    ],
    ids=["no slice", "negative", "gap", "too long", "never begun"],
)
def test_elements_that_do_not_fit_are_refused_before_they_are_written(bad):
    worker = opened()
    with pytest.raises(InvalidFrame):
        worker.writes(bad)
    assert worker.held(range(3)) == 0


def test_a_slice_that_is_said_to_be_unchanged_is_at_the_step():
    worker = opened()
    unchanged = run(0, 0, 0)
    worker.writes(unchanged)
    worker.wrote(unchanged, 1)
    assert worker.held([0]) == 1


def test_a_torn_slice_cannot_be_unchanged():
    worker = opened()
    worker.writes(run(0, 0, 2))
    with pytest.raises(InvalidFrame, match="slice 0"):
        worker.writes(run(0, 0, 0))
    assert worker.held([0]) == -1


def test_two_shards_must_send_the_same_record():
    worker = opened()
    worker.take_record(record(1), 1)
    worker.take_record(record(1), 1)
    with pytest.raises(Internal, match="different records of step 1"):
        worker.take_record(record(1, count=7), 1)


def test_a_record_of_another_step_is_refused():
    worker = opened()
    with pytest.raises(InvalidFrame, match="record of step 2"):
        worker.take_record(record(2), 1)


def test_a_step_that_is_formed_again_in_the_next_generation_may_have_another_record():
    worker = opened()
    worker.take_record(record(1), 1)
    worker.freeze(entry(2))
    worker.open(jobs.plan(entry(2)))
    worker.take_record(record(1, count=7), 1)


def test_a_step_is_taken_with_its_record():
    worker = stepped(stepped(opened(), 1), 2)
    assert (worker.version, worker.record) == (2, record(2))
    assert worker.step_counts() == (2, 2, 2)


def test_a_step_cannot_be_taken_in_a_generation_that_has_ended():
    worker = opened()
    plan = worker.plan
    worker.take_record(record(1), 1)
    receive(worker, 1)
    worker.freeze(entry(2))
    with pytest.raises(StaleGeneration):
        worker.took(plan, 1)
    assert (worker.version, worker.record) == (0, None)


def test_the_record_comes_from_the_plan_where_all_replies_came_before_the_freeze():
    """The record was once lost with the generation that had sent it."""
    worker = opened()
    worker.take_record(record(1), 1)
    receive(worker, 1)
    worker.freeze(entry(2))
    worker.open(jobs.plan(entry(2), 1, record(1)))
    assert worker.behind(range(3), 1) == []
    worker.took(worker.plan, 1)
    assert (worker.version, worker.record) == (1, record(1))
    assert worker.step_counts() == (1, 1, 1)


def test_a_joiner_adopts_the_record_with_the_weights():
    worker = opened(origin="x", base=5, of=record(5))
    receive(worker, 5)
    worker.took(worker.plan, 5)
    assert (worker.version, worker.step_counts()) == (5, (5, 5, 5))
    assert not worker.freeze(entry(2, origin="x")).fresh


def test_a_step_without_any_record_keeps_the_one_before():
    worker = stepped(opened(), 1)
    worker.took(worker.plan, 2)
    assert (worker.version, worker.record) == (2, record(1))


def test_before_the_first_generation_nothing_is_counted():
    assert new().step_counts() == ()


# --- slices come from the entry, and a loaded state with the worker ------------------------------


def test_slices_are_cut_as_the_first_generation_says():
    worker = new()
    assert worker.slices == ()
    finer = dataclasses.replace(entry(), spec=dataclasses.replace(SPEC, slice_bytes=64))
    worker.freeze(finer)
    assert worker.slices == cut(finer.spec)


def test_what_was_cut_in_another_way_is_not_held_any_more():
    worker = stepped(opened(), 1)
    finer = dataclasses.replace(SPEC, parameters=SPEC.parameters[:2])
    frozen = worker.freeze(dataclasses.replace(entry(2), spec=finer))
    assert (frozen.slices, frozen.complete, worker.held([0, 1])) == ((), False, -1)
    assert len(worker.slices) == 2


def loaded(version: int = 7) -> Worker:
    return Worker("w", jobs.JOB, record(version))


def begun(origin: str = "w") -> Entry:
    lineage = Lineage(number=1, origin=origin, base_version=7, fingerprint="f" * 64)
    return dataclasses.replace(entry(origin=origin), lineage=lineage)


def test_the_origin_of_a_loaded_state_holds_its_version_and_its_record():
    worker = loaded()
    frozen = worker.freeze(begun())
    assert (frozen.slices, frozen.versions) == ((0, 1, 2), (7, 7, 7))
    assert (frozen.record, frozen.complete, frozen.fresh) == (record(7), True, False)
    assert (worker.version, worker.step_counts()) == (7, (7, 7, 7))
    worker.open(jobs.plan(begun(), 7, record(7)))
    stepped(worker, 8)
    assert worker.record == record(8)


def test_a_worker_that_has_loaded_a_state_and_joins_holds_nothing_yet():
    worker = loaded()
    frozen = worker.freeze(begun(origin="x"))
    assert (frozen.slices, frozen.record, frozen.fresh) == ((), None, True)
    assert worker.version == -1
