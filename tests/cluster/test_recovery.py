"""From the answers of all members follows where a generation begins, or what is lost (C4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from adashard.wire.control import Frozen, FullSums
from adashard.wire.messages import Entry, Lineage, Member, Outcome, Plan, Record, Source
from adashard.wire.spec import AdafactorLayout, Group, JobSpec, Parameter
from adashard_server.cluster.recovery import CHECKPOINT, Lost, reconcile

LINEAGE = 3


def an_entry(placement: Sequence[int], shards: int = 2, workers: Sequence[str] = ()) -> Entry:
    spec = JobSpec(
        parameters=tuple(Parameter(name=f"p{n}", shape=(2,)) for n in range(len(placement))),
        groups=(Group(adafactor=AdafactorLayout()),),
        slice_bytes=4096,
        min_workers=1,
    )
    return Entry(
        job="job",
        generation=7,
        author="c/1",
        spec=spec,
        workers=tuple(Member(id=worker, rank=rank) for rank, worker in enumerate(workers)),
        shards=tuple(Member(id=f"s{n}") for n in range(shards)),
        placement=tuple(placement),
        lineage=Lineage(number=LINEAGE, origin="w0"),
    )


def a_record(step: int, workers: tuple[str, ...] = ("w0", "w1")) -> Record:
    return Record(
        step=step,
        workers=workers,
        shares=(1.0,) * len(workers),
        outcome=Outcome.APPLY,
        present=b"\x01",
        step_counts=(step,),
        groups=(),
    )


def an_answer(
    versions: Mapping[int, int] | None = None,
    *,
    full: FullSums | None = None,
    record: Record | None = None,
    lineage: int = LINEAGE,
) -> Frozen:
    held = versions or {}
    return Frozen(
        job="job",
        generation=7,
        lineage=lineage,
        slices=tuple(held),
        versions=tuple(held.values()),
        sums=(full,) if full else (),
        record=record,
    )


def test_where_all_slices_have_one_version_nothing_is_copied():
    answers = {"s0": an_answer({0: 4}, record=a_record(4)), "s1": an_answer({1: 4})}
    entry = an_entry([0, 1])
    assert reconcile(entry, answers) == Plan(entry=entry, base=4, record=a_record(4))


def test_the_base_is_the_highest_version_of_any_slice():
    full = FullSums(step=5, workers=("w0", "w1"), slices=(1,))
    answers = {
        "s0": an_answer({0: 5}, record=a_record(5)),
        "s1": an_answer({1: 4}, full=full, record=a_record(4)),
    }
    plan = reconcile(an_entry([0, 1]), answers)
    assert isinstance(plan, Plan)
    assert (plan.base, plan.record, plan.sources) == (5, a_record(5), ())


def test_full_sums_of_other_workers_do_not_count():
    full = FullSums(step=5, workers=("w0",), slices=(1,))
    answers = {
        "s0": an_answer({0: 5}, record=a_record(5)),
        "s1": an_answer({1: 4}, full=full, record=a_record(4)),
    }
    entry = an_entry([0, 1])
    assert reconcile(entry, answers) == Plan(entry=entry, base=5, record=a_record(5), behind=(1,))


def test_full_sums_of_another_step_or_slice_do_not_count():
    for full in (
        FullSums(step=4, workers=("w0", "w1"), slices=(1,)),
        FullSums(step=5, workers=("w0", "w1"), slices=(0,)),
    ):
        answers = {
            "s0": an_answer({0: 5}, record=a_record(5)),
            "s1": an_answer({1: 4}, full=full),
        }
        plan = reconcile(an_entry([0, 1]), answers)
        assert isinstance(plan, Plan)
        assert (plan.base, plan.behind, plan.sources) == (5, (1,), ())


def test_each_slice_comes_from_who_has_it_at_its_highest_version():
    """One worker has slice 0 at 5 and slice 1 at 4, the other has both at 4: both are needed."""
    entry = an_entry([0, 1], workers=["w0", "w1"])
    answers = {
        "s0": an_answer(),
        "s1": an_answer(),
        "w0": an_answer({0: 4, 1: 4}, record=a_record(4)),
        "w1": an_answer({0: 5, 1: 4}, record=a_record(5)),
    }
    plan = reconcile(entry, answers)
    assert isinstance(plan, Plan)
    assert (plan.base, plan.record, plan.behind) == (5, a_record(5), (1,))
    assert plan.sources == (
        Source(slice=0, member="w1", version=5),
        Source(slice=1, member="w0", version=4),
    )


def test_a_slice_two_versions_behind_is_lost_and_so_is_one_behind_a_step_without_a_record():
    for behind, record in ((3, a_record(5)), (4, None)):
        answers = {"s0": an_answer({0: 5}, record=record), "s1": an_answer({1: behind})}
        assert reconcile(an_entry([0, 1]), answers) == Lost(slice_index=1, version=5)


def test_a_lineage_from_a_checkpoint_has_every_slice_in_it_at_its_base_version():
    lineage = Lineage(number=LINEAGE, origin="", base_version=8, checkpoint="step-8")
    entry = replace(an_entry([0, 1], workers=["w0"]), lineage=lineage)
    answers = {
        "s0": an_answer(),
        "s1": an_answer({1: 9}, lineage=LINEAGE - 1),
        "w0": an_answer({0: 9}, lineage=LINEAGE - 1, record=a_record(9)),
    }
    plan = reconcile(entry, answers, a_record(8))
    assert isinstance(plan, Plan)
    assert (plan.base, plan.record, plan.behind) == (8, a_record(8), ())
    assert plan.sources == tuple(Source(slice=n, member=CHECKPOINT, version=8) for n in (0, 1))


def test_a_member_is_preferred_to_the_checkpoint_that_its_lineage_came_from():
    lineage = Lineage(number=LINEAGE, origin="", base_version=8, checkpoint="step-8")
    entry = replace(an_entry([0, 1], workers=["w0"]), lineage=lineage)
    answers = {
        "s0": an_answer({0: 9}, record=a_record(9)),
        "s1": an_answer(),
        "w0": an_answer({1: 8}, record=a_record(8)),
    }
    plan = reconcile(entry, answers, a_record(8))
    assert isinstance(plan, Plan)
    assert (plan.base, plan.record, plan.behind) == (9, a_record(9), (1,))
    assert plan.sources == (Source(slice=1, member="w0", version=8),)


def test_the_record_comes_from_a_member_that_holds_the_base():
    answers = {
        "s0": an_answer({}, record=a_record(4, ("old",))),
        "s1": an_answer({0: 4}, record=a_record(4)),
    }
    plan = reconcile(an_entry([1]), answers)
    assert isinstance(plan, Plan)
    assert plan.record == a_record(4)


def test_a_record_of_another_step_is_not_the_one_of_the_base():
    plan = reconcile(an_entry([0]), {"s0": an_answer({0: 4}, record=a_record(5))})
    assert isinstance(plan, Plan)
    assert plan.record is None


def test_the_first_version_has_no_record():
    entry = an_entry([0], workers=["w0"])
    answers = {"s0": an_answer(), "s1": an_answer(), "w0": an_answer({0: 0})}
    plan = reconcile(entry, answers)
    assert plan == Plan(entry=entry, base=0, sources=(Source(slice=0, member="w0", version=0),))


def test_a_loaded_version_has_the_record_that_its_origin_made():
    entry = an_entry([0, 1], workers=["w0"])
    stands_for = a_record(10, ())
    answers = {
        "s0": an_answer(),
        "s1": an_answer(),
        "w0": an_answer({0: 10, 1: 10}, record=stands_for),
    }
    plan = reconcile(entry, answers)
    assert isinstance(plan, Plan)
    assert (plan.base, plan.record) == (10, stands_for)
    assert [source.member for source in plan.sources] == ["w0", "w0"]


def test_a_shard_is_preferred_to_a_worker_as_source_and_the_lowest_rank_among_workers():
    entry = an_entry([0, 0], workers=["w0", "w1"])
    answers = {
        "w1": an_answer({0: 4, 1: 4}),
        "w0": an_answer({1: 4}),
        "s1": an_answer({0: 4}),
        "s0": an_answer(),
    }
    plan = reconcile(entry, answers)
    assert isinstance(plan, Plan)
    assert plan.sources == (
        Source(slice=0, member="s1", version=4),
        Source(slice=1, member="w0", version=4),
    )


def test_copies_of_another_lineage_do_not_count():
    answers = {
        "s0": an_answer({0: 9}, lineage=LINEAGE - 1, record=a_record(9)),
        "w0": an_answer({0: 0}),
    }
    plan = reconcile(an_entry([0], workers=["w0"]), answers)
    assert isinstance(plan, Plan)
    assert (plan.base, plan.record) == (0, None)
    assert plan.sources == (Source(slice=0, member="w0", version=0),)


def test_a_slice_that_nobody_holds_is_lost():
    assert reconcile(an_entry([0, 0]), {"s0": an_answer({0: 4})}) == Lost(slice_index=1, version=4)
    assert reconcile(an_entry([0]), {"s0": an_answer()}) == Lost(slice_index=0, version=-1)


@given(st.data())
def test_every_slice_begins_at_its_highest_version_from_a_member_that_reaches_it(
    data: st.DataObject,
):
    count, shards = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    placement = data.draw(st.lists(st.integers(0, shards - 1), min_size=count, max_size=count))
    entry = an_entry(placement, shards, ["w0", "w1"])
    held = st.dictionaries(st.integers(0, count - 1), st.integers(3, 5))
    answers = {
        member.id: an_answer(versions, record=a_record(max(versions.values(), default=5)))
        for member in (*entry.shards, *entry.workers)
        for versions in [data.draw(held)]
    }
    best = {
        index: max((v for a in answers.values() for i, v in holding(a) if i == index), default=-1)
        for index in range(count)
    }
    plan = reconcile(entry, answers)
    base = max(best.values())
    if isinstance(plan, Lost):
        assert best[plan.slice_index] < max(base - 1, 0)
        return
    assert (plan.base, plan.record) == (base, a_record(base))
    assert plan.behind == tuple(index for index in best if best[index] < base)
    sources = {source.slice: source.member for source in plan.sources}
    for index, owner in enumerate(placement):
        placed = (index, best[index]) in holding(answers[f"s{owner}"])
        assert placed != (index in sources)
        assert placed or (index, best[index]) in holding(answers[sources[index]])


def holding(answer: Frozen) -> list[tuple[int, int]]:
    return list(zip(answer.slices, answer.versions, strict=True))
