"""A worker's decisions, rule by rule: what it promises, holds, and may use."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs

from adashard.wire.control import Frozen, Stale, Standing
from adashard.wire.errors import Internal, InvalidFrame, StaleGeneration
from adashard.wire.messages import Entry, Lineage, Outcome, Record, Source
from adashard.wire.placement import cut
from adashard.wire.spec import Recovery
from adashard.worker import Worker

SPEC = jobs.spec((4,), (3,), ())
CHECKPOINT = dataclasses.replace(SPEC, recovery=Recovery.CHECKPOINT)


def new(name: str = "w") -> Worker:
    return Worker(name, jobs.JOB)


def entry(generation: int = 1, *, origin: str = "w", workers: str = "w", spec=SPEC, **options):
    return jobs.entry(spec, generation=generation, workers=workers, origin=origin, **options)


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


def receive(worker: Worker, step: int, *indices: int) -> None:
    """Whole slices at `step` arrive."""
    for index in indices or range(3):
        worker.arrived(index, step)


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
        fresh=True,
        complete=True,
    )
    assert (worker.version, worker.held([0, 1, 2])) == (0, 0)
    again = worker.freeze(entry(3, lineage=3))  # nobody has come as far as to open the first
    assert (again.lineage, again.versions, again.fresh) == (3, (0, 0, 0), True)
    worker.changed(1)
    frozen = worker.freeze(entry(4, lineage=4))
    assert (frozen.lineage, frozen.slices, frozen.fresh) == (3, (0, 2), False)


def test_another_worker_s_lineage_makes_no_copies_of_this_one_s_weights():
    worker = new()
    frozen = worker.freeze(entry(origin="x"))
    assert frozen == Frozen(job=jobs.JOB, generation=1, fresh=True)


def test_a_lineage_that_names_it_a_second_time_finds_no_initial_weights():
    worker = stepped(opened(origin="x"), 0)
    frozen = worker.freeze(entry(2, lineage=2))
    assert (frozen.fresh, frozen.lineage, worker.version) == (False, 1, 0)


def test_weights_that_have_been_written_over_are_not_initial_any_more():
    """Not even before the step that wrote them is whole."""
    worker = opened(origin="x")
    worker.arrived(0, 0)
    assert not worker.freeze(entry(2, origin="x")).fresh


def test_weights_that_were_there_already_are_initial_until_all_have_come():
    worker = opened(origin="x")
    assert worker.freeze(entry(2, origin="x")).fresh


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


# --- W2: what it answers -------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2), max_size=5), st.sampled_from([SPEC, CHECKPOINT]))
def test_it_answers_with_every_slice_that_it_has_a_copy_of_and_the_newest_one_s_record(came, spec):
    """Where replies bring no state, these are what the job began with and nothing else."""
    worker = opened(spec=spec)
    worker.take_record(record(1), 1)
    for index in came:
        worker.arrived(index, 1)
    frozen = worker.freeze(entry(2, spec=spec))
    versions = {index: int(index in came) for index in range(3)}
    if spec is CHECKPOINT:
        versions = {index: 0 for index in range(3) if index not in came}
    assert dict(zip(frozen.slices, frozen.versions, strict=True)) == versions
    assert frozen.record == (record(1) if came else None), "nobody has heard of another step"
    assert (frozen.complete, worker.version) == (True, 0)


def test_its_copies_are_of_no_use_to_another_lineage_and_say_so():
    frozen = stepped(opened(), 1).freeze(entry(2, lineage=2, origin="x"))
    assert (frozen.lineage, frozen.versions) == (1, (1, 1, 1))


def test_the_record_of_the_base_is_that_of_the_plan_until_the_step_is_taken():
    """Some of the slices came in the generation before, and the next one freezes again."""
    worker = opened()
    worker.take_record(record(1), 1)
    worker.arrived(0, 1)
    for generation in (2, 3):
        frozen = worker.freeze(entry(generation))
        assert (frozen.versions, frozen.record) == ((1, 0, 0), record(1))
        worker.open(jobs.plan(entry(generation), 1, record(1)))


def test_without_state_an_unchanged_slice_is_no_copy_after_the_first_version():
    worker = opened(spec=CHECKPOINT)
    worker.arrived(0, 1, unchanged=True)
    assert worker.freeze(entry(2, spec=CHECKPOINT)).slices == (1, 2)


# --- W3: supplies --------------------------------------------------------------------------------


def sources(plan, *named: tuple[int, int], member: str = "w"):
    """The plan, with these slices and versions wanted of a member."""
    wanted = tuple(Source(slice=i, member=member, version=v) for i, v in named)
    return dataclasses.replace(plan, sources=wanted)


def test_it_supplies_what_the_plan_names_it_for():
    worker = new()
    plan = jobs.plan(entry(), sources=True)
    worker.freeze(plan.entry)
    assert worker.supplies(plan) == {0: 0, 1: 0, 2: 0}
    some = dataclasses.replace(plan, sources=plan.sources[1:2])
    assert worker.supplies(some) == {1: 0}
    assert not worker.misses(plan)


def test_it_supplies_slices_at_the_base_and_others_at_the_version_before():
    worker = opened()
    worker.take_record(record(1), 1)
    worker.arrived(1, 1)
    worker.freeze(entry(2))
    plan = sources(jobs.plan(entry(2), 1, record(1)), (0, 0), (1, 1))
    assert worker.supplies(plan) == {0: 0, 1: 1}


def test_it_supplies_nothing_to_others_plans_or_other_generations_or_after_the_open():
    worker = new()
    worker.freeze(entry())
    plan = jobs.plan(entry(), sources=True)
    assert worker.supplies(sources(plan, (0, 0), member="x")) == {}
    worker.open(plan)
    assert worker.supplies(plan) == {}
    worker.freeze(entry(2))
    assert worker.supplies(plan) == {}
    assert not worker.misses(plan)


@pytest.mark.parametrize("named", [(0, 1), (1, 0)], ids=["not yet", "changed"])
def test_a_plan_that_names_it_for_what_it_has_not_is_answered_with_what_it_has(named):
    worker = new()
    worker.freeze(entry())
    worker.changed(1)
    plan = sources(jobs.plan(entry()), named, (2, 0))
    assert worker.supplies(plan) == {2: 0}
    assert worker.misses(plan)
    assert worker.freeze(plan.entry).slices == (0, 2)


def test_a_slice_that_was_changed_comes_whole_with_the_next_step():
    worker = opened()
    worker.changed(1)
    assert worker.held([0, 1]) == -1
    assert worker.behind(range(3), 1) == [0, 1, 2]
    with pytest.raises(InvalidFrame, match="unchanged"):
        worker.arrived(1, 1, unchanged=True)
    assert stepped(worker, 1).freeze(entry(2)).slices == (0, 1, 2)


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
    worker.take_record(record(1), 1)
    worker.arrived(0, 1)
    assert worker.open(jobs.plan(entry()))
    assert worker.behind(range(3), 1) == [1, 2]
    assert worker.freeze(entry(2)).record == record(1)


def test_a_freeze_takes_nothing_from_slices_that_have_come():
    worker = opened()
    worker.take_record(record(1), 1)
    worker.arrived(0, 1)
    worker.freeze(entry(2))
    worker.open(jobs.plan(entry(2), 1, record(1)))
    assert (worker.held([0]), worker.behind(range(3), 1)) == (1, [1, 2])


# --- W4: the gradient of a step that is decided --------------------------------------------------


def test_the_gradient_of_the_next_step_goes_to_every_shard():
    worker = opened()
    assert worker.owes(worker.plan, [0, 2], 1) == [0, 2]


@pytest.mark.parametrize("workers", [("w",), ("v",)])
def test_a_decided_step_is_pushed_again_by_those_who_took_part_for_slices_that_nobody_has(workers):
    worker = opened()
    worker.arrived(0, 1)
    worker.freeze(entry(2))
    of = dataclasses.replace(record(1), workers=workers)
    plan = dataclasses.replace(jobs.plan(entry(2), 1, of), behind=(2,))
    worker.open(plan)
    assert worker.behind(range(3), 1) == [1, 2]
    assert worker.owes(plan, range(3), 1) == ([2] if workers == ("w",) else [])


def test_a_first_version_has_no_gradient():
    worker = opened(origin="x")
    assert worker.owes(worker.plan, range(3), 0) == []


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


def test_a_slice_is_at_the_step_that_it_has_come_with():
    worker = opened()
    worker.arrived(0, 1)
    assert [worker.held([index]) for index in range(3)] == [1, 0, 0]
    assert worker.behind(range(3), 1) == [1, 2]


@pytest.mark.parametrize("index", [3, -1])
def test_a_slice_that_does_not_exist_is_refused(index):
    worker = opened()
    with pytest.raises(InvalidFrame, match="there is no slice"):
        worker.arrived(index, 1)
    assert worker.held(range(3)) == 0


def test_a_slice_that_is_said_to_be_unchanged_is_at_the_step():
    worker = opened()
    for _ in range(2):  # a stream that is repeated says it again
        worker.arrived(0, 1, unchanged=True)
        assert worker.held([0]) == 1


@pytest.mark.parametrize("held", [-1, 0, 3])
def test_a_slice_that_is_not_at_the_version_before_cannot_be_unchanged(held):
    worker = opened(origin="x", base=max(held, 0), of=record(3) if held == 3 else None)
    if held >= 0:
        worker.arrived(0, held)
    with pytest.raises(InvalidFrame, match="slice 0 is said to be unchanged in step 2"):
        worker.arrived(0, 2, unchanged=True)
    assert worker.held([0]) == held


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
    assert (frozen.record, frozen.complete, frozen.fresh) == (record(7), True, True)
    assert (worker.version, worker.step_counts()) == (7, (7, 7, 7))
    worker.open(jobs.plan(begun(), 7, record(7)))
    stepped(worker, 8)
    assert worker.record == record(8)


def test_a_worker_that_has_loaded_a_state_and_joins_holds_nothing_yet():
    worker = loaded()
    frozen = worker.freeze(begun(origin="x"))
    assert (frozen.slices, frozen.record, frozen.fresh) == ((), None, True)
    assert worker.version == -1
