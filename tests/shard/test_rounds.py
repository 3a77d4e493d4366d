"""The rounds of one job on one shard: sums, and what of them survives a change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.clusters import Cluster, Node
from tests.shard.pushers import COUNTS, SPEC, Pusher, act_until_done, dice, opened, presences

from adashard.wire.control import Frozen, FullSums, Stale
from adashard.wire.errors import StaleGeneration
from adashard.wire.messages import Exchange, Outcome
from adashard_server.shard.instructions import Add, Wait

# --- sums ----------------------------------------------------------------------------------------


@given(st.lists(presences, min_size=3, max_size=3), dice)
def test_any_order_of_arrival_and_any_borders_add_each_gradient_once_in_rank_order(
    present, chooser
):
    """Pushes are also broken off and begun again on the way."""
    node = opened(workers="abc")
    entry = node.rounds.entry
    pushers = [
        Pusher(node, jobs.begin(entry, worker, present=have), have, chooser)
        for worker, have in zip("abc", present, strict=True)
    ]
    act_until_done(pushers, chooser)
    for index, count in enumerate(COUNTS):
        expected = [worker for worker, have in zip("abc", present, strict=True) if index in have]
        assert node.sums.get(index, [[]] * count) == [expected] * count
    (record,) = node.records
    assert record.workers == ("a", "b", "c")
    assert record.present == jobs.bits(set().union(*present), 3)
    assert record.step_counts == tuple(int(index in set().union(*present)) for index in range(3))


def test_only_the_first_present_addend_overwrites_what_an_older_step_left():
    node = opened(workers="abc")
    entry = node.rounds.entry
    absent = jobs.begin(entry, "a", present=[])
    second, third = (jobs.begin(entry, worker) for worker in "bc")
    for begin in (absent, second, third):
        node.begin(begin)
    assert node.rounds.admit(third, 0, 0, 6) == Wait()
    assert node.rounds.admit(second, 0, 0, 4) == Add(0, 4, first=True)
    node.push(second, 0, 0, 4)
    assert node.rounds.admit(third, 0, 0, 4) == Add(0, 4, first=False)
    assert node.rounds.admit(third, 0, 0, 5) == Wait()


def test_a_repeated_piece_is_not_added_again_and_one_that_goes_on_adds_only_the_rest():
    node = opened()
    begin = jobs.begin(node.rounds.entry, "a")
    node.begin(begin)
    node.push(begin, 0, 0, 4)
    assert node.rounds.admit(begin, 0, 0, 4) is None
    assert node.rounds.admit(begin, 0, 1, 2) is None
    assert node.rounds.admit(begin, 0, 2, 4) == Add(4, 6, first=True)


def test_a_push_that_is_wholly_in_is_said_to_be_complete():
    node = opened(workers="ab")
    begin = jobs.begin(node.rounds.entry, "a")
    assert not node.begin(begin)
    node.push_all(begin)
    assert node.begin(begin)


def test_a_push_for_a_step_that_is_decided_is_complete_and_its_pieces_are_dropped():
    node = opened()
    begin = jobs.begin(node.rounds.entry, "a")
    node.push_all(begin)
    assert (node.rounds.version, len(node.records)) == (1, 1)
    assert node.begin(begin)
    assert node.push(begin, 0, 0, 6)
    assert node.sums[0] == [["a"]] * 6


def test_a_worker_without_any_gradient_counts_as_zero():
    node = opened(workers="ab")
    entry = node.rounds.entry
    assert node.begin(jobs.begin(entry, "a", present=[]))
    node.push_all(jobs.begin(entry, "b"))
    (record,) = node.records
    assert (record.workers, record.shares) == (("a", "b"), (1.0, 1.0))
    assert node.sums[0] == [["b"]] * 6


def test_a_parameter_that_all_lack_takes_a_version_and_no_update():
    node = opened(workers="ab")
    entry = node.rounds.entry
    for worker in "ab":
        node.push_all(jobs.begin(entry, worker, present=[1]))
    (record,) = node.records
    assert (record.outcome, record.step_counts) == (Outcome.APPLY, (0, 1, 0))
    assert [node.rounds.updates(index) for index in range(3)] == [False, True, False]
    node.settle()
    assert node.rounds.versions == {0: 1, 1: 1, 2: 1}


def test_a_step_in_which_nobody_has_any_gradient_is_taken():
    node = opened()
    assert node.begin(jobs.begin(node.rounds.entry, "a", present=[]))
    (record,) = node.records
    assert (record.outcome, record.squared_norm) == (Outcome.APPLY, 0.0)
    node.settle()
    assert node.rounds.version == 1
    assert node.begin(jobs.begin(node.rounds.entry, "a", 2, present=[]))


# --- what survives a change of generation --------------------------------------------------------


@st.composite
def changes(draw) -> tuple[list[set[int]], str]:
    """What three workers have gradients for, and the workers after the change, in rank order."""
    order = draw(st.sets(st.sampled_from("abcd"), min_size=1))
    return draw(st.lists(presences, min_size=3, max_size=3)), "".join(sorted(order))


@given(changes(), dice, st.integers(0, 25))
def test_a_sum_survives_a_change_if_its_addends_are_a_prefix_of_the_new_order(
    change, chooser, actions
):
    present, order = change
    node = opened(workers="abc")
    pushers = [
        Pusher(node, jobs.begin(node.rounds.entry, worker, present=have), have, chooser)
        for worker, have in zip("abc", present, strict=True)
    ]
    for _ in range(actions):
        waiting = [pusher for pusher in pushers if not pusher.done]
        if waiting and not node.rounds.owed:
            chooser.choice(waiting).act()
    if node.rounds.owed:
        return  # decided before the change; see below
    before = {index: [list(one) for one in elements] for index, elements in node.sums.items()}
    has = dict(zip("abcd", [*present, {0, 1, 2}], strict=True))
    begun = {p.begin.sender for p in pushers if p.todo is not None}

    later = jobs.entry(SPEC, generation=2, workers=order)
    node.open(jobs.plan(later))
    for worker in order:
        node.begin(jobs.begin(later, worker, present=has[worker]))
    for index, count in enumerate(COUNTS):
        added = {worker for element in before.get(index, []) for worker in element}
        absent = {worker for worker in begun if index not in has[worker]}
        expected = [worker for worker in order if worker not in absent]
        survives = expected[: len(added)] == sorted(added)
        for worker in sorted(added & set(order)):
            in_sum = sum(worker in element for element in before[index]) if survives else 0
            admission = node.rounds.admit(
                jobs.begin(later, worker, present=has[worker]), index, 0, count
            )
            came = {None: count}.get(admission, getattr(admission, "start", None))
            assert isinstance(admission, Wait) or came == in_sum

    act_until_done(
        [
            Pusher(node, jobs.begin(later, worker, present=has[worker]), has[worker], chooser)
            for worker in order
        ],
        chooser,
    )
    assert len(node.records) == 1
    for index, count in enumerate(COUNTS):
        summed = [worker for worker in order if index in has[worker]]
        if summed:
            assert node.sums[index] == [summed] * count


def test_a_leaving_worker_is_in_no_new_round():
    node = opened(workers="ab", leaving="b")
    assert node.rounds.order == ("a",)
    node.push_all(jobs.begin(node.rounds.entry, "a"))
    assert node.records[0].workers == ("a",)


def test_full_sums_are_told_at_a_freeze_and_taken_with_the_record_of_the_plan():
    """Another shard has committed the step; this one was frozen before the last report came."""
    entry = jobs.entry(SPEC, workers="ab", shards=("s0", "s1"))
    cluster = Cluster(entry)
    late, done = cluster.nodes.values()
    cluster.push_all()
    report = late.rounds.own_report(1, Exchange.PARTIALS)
    done.carry_out(done.rounds.exchange(report))
    (record,) = done.records
    assert late.records == []
    done.rounds.applied(1)
    later = jobs.entry(SPEC, generation=2, workers="a", shards=("s0", "s1"))
    frozen = late.rounds.freeze(later)
    mine = late.rounds.mine
    assert isinstance(frozen, Frozen)
    assert frozen.sums == (FullSums(step=1, workers=("a", "b"), slices=mine),)
    assert (frozen.record, frozen.versions) == (None, (0,) * len(mine))
    assert done.rounds.freeze(later).record == record
    late.open(jobs.plan(later, base=1, record=record))
    done.open(jobs.plan(later, base=1, record=record))
    assert late.rounds.record == done.rounds.record == record
    assert set(late.rounds.versions.values()) == {1}
    assert (late.rounds.version, done.rounds.version) == (1, 1)


def test_a_step_that_no_slice_has_taken_is_formed_again_by_those_that_are_left():
    """Its record is not told at the freeze, so the generation begins before it."""
    node = opened(workers="ab")
    for worker in "ab":
        node.push_all(jobs.begin(node.rounds.entry, worker))
    assert len(node.records) == 1
    later = jobs.entry(SPEC, generation=2, workers="a")
    frozen = node.rounds.freeze(later)
    assert isinstance(frozen, Frozen)
    assert (frozen.record, frozen.versions) == (None, (0, 0, 0))
    node.open(jobs.plan(later))
    node.push_all(jobs.begin(later, "a"))
    assert node.records[-1].workers == ("a",)
    assert node.records[-1].step_counts == (1, 1, 1)
    assert node.sums[0] == [["a"]] * 6


def test_half_applied_steps_are_finished_after_the_change():
    node = opened()
    node.push_all(jobs.begin(node.rounds.entry, "a"))
    node.rounds.applied(1)
    frozen = node.rounds.freeze(jobs.entry(SPEC, generation=2))
    assert isinstance(frozen, Frozen)
    assert dict(zip(frozen.slices, frozen.versions, strict=True)) == {0: 0, 1: 1, 2: 0}
    assert frozen.record == node.records[0]
    assert node.rounds.owed == {0, 2}
    node.open(jobs.plan(jobs.entry(SPEC, generation=2), base=1, record=node.records[0]))
    assert node.rounds.versions == {0: 1, 1: 1, 2: 1}


def test_a_repeated_freeze_gets_the_same_answer_and_an_older_one_is_told_of_the_promise():
    node = opened()
    later = jobs.entry(SPEC, generation=3)
    first = node.rounds.freeze(later)
    assert node.rounds.freeze(later) == first
    older = jobs.entry(SPEC, generation=2)
    assert node.rounds.freeze(older) == Stale(job=jobs.JOB, promised=3)
    with pytest.raises(StaleGeneration):
        node.rounds.plan(jobs.plan(older))
    with pytest.raises(StaleGeneration):
        node.rounds.open(jobs.plan(older))


def test_a_plan_and_an_open_of_a_generation_that_is_open_change_nothing():
    node = opened(workers="ab")
    node.push_all(jobs.begin(node.rounds.entry, "a"))
    again = jobs.plan(node.rounds.entry)
    node.rounds.plan(again)
    assert node.rounds.open(again) == []
    node.push_all(jobs.begin(node.rounds.entry, "b"))
    assert node.sums[0] == [["a", "b"]] * 6


def test_what_another_lineage_left_is_dropped_at_the_plan():
    node = opened(workers="ab")
    node.push_all(jobs.begin(node.rounds.entry, "a"))
    other = jobs.entry(SPEC, generation=2, workers="ab", lineage=2)
    node.rounds.freeze(other)
    node.rounds.plan(jobs.plan(other))
    assert (node.rounds.versions, node.rounds.record, node.rounds.planned) == ({}, None, False)
    node.open(jobs.plan(other))
    for worker in "ab":
        node.push_all(jobs.begin(other, worker))
    assert node.sums[0] == [["a", "b"]] * 6


def test_a_job_without_a_lineage_is_planned_without_slices():
    node = Node("s1")
    node.rounds.freeze(jobs.entry(SPEC, shards=("s0",), lineage=0))
    plan = jobs.plan(jobs.entry(SPEC, shards=("s0",), lineage=0))
    assert not node.rounds.has_plan(1)
    node.rounds.plan(plan)
    assert node.rounds.has_plan(1)
    assert node.rounds.planned  # nothing is placed here


def test_slices_placed_elsewhere_are_kept_until_the_generation_opens():
    node = opened()
    elsewhere = jobs.entry(SPEC, generation=2, shards=("s0", "s1"), placement=(1, 0, 1))
    frozen = node.rounds.freeze(elsewhere)
    assert isinstance(frozen, Frozen)
    assert frozen.slices == (0, 1, 2)
    node.rounds.plan(jobs.plan(elsewhere))
    assert set(node.rounds.versions) == {0, 1, 2}
    node.rounds.open(jobs.plan(elsewhere))
    assert set(node.rounds.versions) == {1}


def test_a_job_that_is_replaced_by_a_smaller_one_leaves_nothing():
    """Its shard hears of the new job in a freeze, like of any other change."""
    node = opened()
    node.push_all(jobs.begin(node.rounds.entry, "a"))
    node.settle()
    smaller = jobs.entry(jobs.spec((2,)), generation=2, lineage=2)
    frozen = node.rounds.freeze(smaller)
    assert isinstance(frozen, Frozen)
    assert (frozen.slices, frozen.sums, frozen.record) == ((), (), None)
    node.open(jobs.plan(smaller))
    node.push_all(jobs.begin(smaller, "a"))
    assert node.records[-1].step_counts == (1,)
