"""A shard's decisions: which gradients are in a sum, when a step is taken, what survives."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.clusters import Cluster, Node, pieces

from adashard.wire.errors import InvalidFrame, InvalidRequest, StaleGeneration
from adashard.wire.messages import (
    AdafactorStep,
    DType,
    Frozen,
    FullSums,
    GroupStep,
    Outcome,
    Report,
    Stale,
    WeightDecayMode,
)
from adashard_server.shard.instructions import Add, Send, Wait
from adashard_server.shard.records import bit, form_record, present_in_any
from adashard_server.shard.rounds import Rounds

SHAPES = ((3, 2), (5,), ())
SPEC = jobs.spec(*SHAPES)
COUNTS = (6, 5, 1)

presences = st.sets(st.sampled_from(range(len(SHAPES))))
dice = st.integers(0, 2**32 - 1).map(random.Random)


def opened(**options) -> Node:
    """A shard that holds all of the job at version 0 and collects step 1."""
    node = Node("s0")
    node.open(jobs.plan(jobs.entry(SPEC, **options)))
    return node


class Pusher:
    """A worker's push to one node: cut anywhere, and begun again at any time."""

    def __init__(self, node, begin, present, chooser) -> None:
        self.node, self.begin, self.present, self.chooser = node, begin, present, chooser
        self.todo: list[tuple[int, int, int]] | None = None

    @property
    def done(self) -> bool:
        return self.todo == []

    def act(self) -> None:
        """Begins, begins again, or sends the next piece if it is its turn."""
        if self.todo is None or self.chooser.random() < 0.15:
            complete = self.node.begin(self.begin)
            self.todo = [] if complete else self._pieces()
        elif self.node.push(self.begin, *self.todo[0]):
            self.todo.pop(0)

    def _pieces(self) -> list[tuple[int, int, int]]:
        mine = [i for i in self.node.rounds.mine if i in self.present]
        self.chooser.shuffle(mine)
        slices = self.node.rounds.slices
        return [piece for index in mine for piece in pieces(slices[index], self.chooser)]


def act_until_done(pushers: list[Pusher], chooser) -> None:
    for _ in range(10_000):
        waiting = [pusher for pusher in pushers if not pusher.done]
        if not waiting:
            return
        chooser.choice(waiting).act()
    raise AssertionError("the pushes of a round wait for each other")


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
    done.carry_out(done.rounds.exchange(late.rounds.own_report(1)))
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
    assert not any(node.rounds.owes(index) for index in range(3))
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
    assert node.rounds.version == -1


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


# --- reports and the commit ----------------------------------------------------------------------

clusters = st.integers(1, 4).map(
    lambda count: jobs.entry(
        jobs.spec(*SHAPES, (2, 2)), workers="ab", shards=[f"s{n}" for n in range(count)]
    )
)


@given(clusters, dice, st.integers(1, 3))
def test_all_shards_commit_the_same_record_however_reports_are_lost_and_doubled(
    entry, chooser, steps
):
    cluster = Cluster(entry)
    for step in range(1, steps + 1):
        cluster.push_all(step)
        cluster.collect_sent()
        while not all(len(records) == step for records in cluster.records):
            for node in cluster.nodes.values():
                node.carry_out(node.rounds.repeat())
            cluster.collect_sent()
            for _ in range(chooser.randrange(len(cluster.flying) + 1)):
                chosen = chooser.randrange(len(cluster.flying))
                if chooser.random() < 0.3:
                    cluster.flying.pop(chosen)
                else:
                    cluster.deliver(chosen, keep=chooser.random() < 0.3)
                if not cluster.flying:
                    break
            assert_all_or_none(cluster, step)
        cluster.flying = [one for one in cluster.flying if chooser.random() < 0.5]
        first = cluster.records[0]
        assert all(records == first for records in cluster.records)
        for node in cluster.nodes.values():
            node.settle()
            assert set(node.rounds.versions.values()) == {step}


def assert_all_or_none(cluster: Cluster, step: int) -> None:
    """Who has committed has everybody's promise: their sums are full, their reports are kept."""
    if any(len(records) == step for records in cluster.records):
        for node in cluster.nodes.values():
            assert node.rounds.own_report(step) is not None


def test_no_shard_commits_before_the_last_report():
    cluster = Cluster(jobs.entry(SPEC, workers="ab", shards=("s0", "s1", "s2")))
    late = cluster.nodes["s2"]
    for worker in "ab":
        for name in ("s0", "s1"):
            begin = jobs.begin(cluster.entry, worker, receiver=name)
            cluster.nodes[name].push_all(begin)
    cluster.deliver_all()
    late.push_all(jobs.begin(cluster.entry, "a", receiver="s2"))
    cluster.deliver_all()
    assert cluster.records == [[], [], []]
    late.push_all(jobs.begin(cluster.entry, "b", receiver="s2"))
    cluster.deliver_all()
    assert [len(records) for records in cluster.records] == [1, 1, 1]


def test_the_own_report_is_kept_after_the_commit_for_whoever_lacks_it():
    node = Cluster(jobs.entry(SPEC, shards=("s0", "s1"))).nodes["s0"]
    entry = node.rounds.entry
    node.push_all(jobs.begin(entry, "a"))
    (send,) = node.sent
    assert (send.peers, send.wanted) == (("s1",), frozenset({"s1"}))
    report = dataclasses.replace(send.report, sender="s1", slices=(1,), squared_sums=(1.0,))
    node.carry_out(node.rounds.exchange(report))
    assert len(node.records) == 1
    assert node.rounds.own_report(1) == send.report
    assert node.rounds.own_report(0) is None
    node.settle()
    assert node.rounds.own_report(1) == send.report
    assert node.rounds.repeat() == []
    assert node.rounds.exchange(report) == []
    node.rounds.freeze(jobs.entry(SPEC, generation=2, shards=("s0", "s1")))
    assert node.rounds.own_report(1) is None


def test_a_report_that_is_here_already_is_not_wanted_again():
    cluster = Cluster(jobs.entry(SPEC, shards=("s0", "s1")))
    first, second = cluster.nodes.values()
    first.push_all(jobs.begin(cluster.entry, "a"))
    cluster.collect_sent()
    second.carry_out(second.rounds.exchange(first.rounds.own_report(1)))
    second.push_all(jobs.begin(cluster.entry, "a", receiver="s1"))
    assert second.sent == [Send(second.rounds.own_report(1), ("s0",), frozenset())]
    assert second.records
    assert first.rounds.repeat() == [Send(first.rounds.own_report(1), ("s1",), frozenset({"s1"}))]


@given(clusters, st.integers(0, 3), st.sampled_from([math.nan, math.inf]))
def test_what_is_not_finite_on_one_shard_is_a_skip_on_all(entry, broken, square):
    cluster = Cluster(entry)
    for node in cluster.nodes.values():
        node.square = lambda index: square if index == broken else 1.0
    cluster.push_all()
    cluster.deliver_all()
    for records in cluster.records:
        (record,) = records
        assert (record.outcome, record.step_counts) == (Outcome.SKIP, (0,) * 4)
        assert record.squared_norm == 0.0
    for node in cluster.nodes.values():
        assert not any(node.rounds.updates(index) for index in node.rounds.mine)
        node.settle()
        assert node.rounds.version == 1
    cluster.push_all(2)
    for node in cluster.nodes.values():
        node.square = float
    cluster.deliver_all()


@given(dice, st.integers(1, 4))
def test_a_record_is_the_same_whoever_forms_it_and_however_slices_are_placed(chooser, count):
    entry = jobs.entry(SPEC, workers="ab")
    begins = [jobs.begin(entry, worker, share=share) for worker, share in (("a", 3.0), ("b", 0.1))]
    squares = [0.1, 0.2, 1e-9, 1e9, 0.3]
    one = Report(
        job=jobs.JOB,
        generation=1,
        sender="s",
        step=1,
        workers=("a", "b"),
        finite=True,
        slices=tuple(range(5)),
        squared_sums=tuple(squares),
    )
    owners = [chooser.randrange(count) for _ in squares]
    many = [
        dataclasses.replace(
            one,
            slices=tuple(i for i, owner in enumerate(owners) if owner == shard),
            squared_sums=tuple(squares[i] for i, owner in enumerate(owners) if owner == shard),
        )
        for shard in range(count)
    ]
    chooser.shuffle(many)
    assert form_record(1, begins, many, (0, 0, 0)) == form_record(1, begins, [one], (0, 0, 0))


def test_hyper_parameters_are_those_of_the_lowest_rank():
    node = opened(workers="ab")
    entry = node.rounds.entry
    ours, theirs = (jobs.group_step(lr=lr) for lr in (0.5, 0.25))
    node.begin(jobs.begin(entry, "b", groups=(theirs,), share=2.0))
    node.push_all(jobs.begin(entry, "a", groups=(ours,)))
    node.push_all(jobs.begin(entry, "b", groups=(theirs,), share=2.0))
    (record,) = node.records
    assert record.groups == (ours,)
    assert record.shares == (1.0, 2.0)
    assert record.squared_norm == sum(square / 9.0 for square in (0.0, 1.0, 2.0))


@given(st.lists(presences, min_size=1, max_size=4))
def test_a_parameter_is_present_if_any_worker_has_it(present):
    entry = jobs.entry(SPEC)
    merged = present_in_any(jobs.begin(entry, "a", present=have) for have in present)
    assert [bit(merged, index) for index in range(3)] == [
        any(index in have for have in present) for index in range(3)
    ]


def test_a_shard_without_slices_commits_nothing():
    node = Node("s1")
    node.open(jobs.plan(jobs.entry(SPEC, shards=("s0", "s1"), placement=(0, 0, 0))))
    assert node.rounds.peers == ("s0",)
    assert node.begin(jobs.begin(node.rounds.entry, "a", receiver="s1"))
    assert node.records == []


def test_a_shard_without_slices_follows_the_others():
    entry = jobs.entry(SPEC, shards=("s0", "s1"), placement=(0, 0, 0))
    node = Node("s1")
    node.open(jobs.plan(entry))
    later = dataclasses.replace(entry, generation=2)
    node.open(jobs.plan(later, base=4))
    assert node.begin(jobs.begin(later, "a", 4, push=False, receiver="s1"))


def test_an_addition_that_was_under_way_at_a_freeze_counts():
    node = opened()
    begin = jobs.begin(node.rounds.entry, "a", present=[0])
    node.begin(begin)
    later = jobs.entry(SPEC, generation=2)
    node.rounds.freeze(later)
    assert node.rounds.added(begin, 0, 6) == []
    frozen = node.rounds.freeze(later)
    assert isinstance(frozen, Frozen)
    assert frozen.sums == (FullSums(step=1, workers=("a",), slices=(0, 1, 2)),)
    node.carry_out(node.rounds.open(jobs.plan(later)))
    assert len(node.records) == 1


def test_sums_that_were_measured_too_late_are_not_believed():
    node = opened(workers="ab")
    assert node.rounds.measured({0: 1.0, 1: 2.0}) == []
    node.push_all(jobs.begin(node.rounds.entry, "a"))
    assert node.rounds.measured({0: math.nan}) == []
    node.push_all(jobs.begin(node.rounds.entry, "b"))
    assert node.records[0].outcome is Outcome.APPLY


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [1, 3])
def test_a_call_of_another_generation_is_refused(generation):
    node = opened()
    current = jobs.entry(SPEC, generation=2)
    node.open(jobs.plan(current))
    foreign = jobs.begin(jobs.entry(SPEC, generation=generation), "a")
    with pytest.raises(StaleGeneration) as refused:
        node.rounds.begin(foreign)
    assert refused.value.facts == {"generation": str(generation), "promised": "2"}
    with pytest.raises(StaleGeneration):
        node.rounds.admit(foreign, 0, 0, 1)


def test_nothing_is_accepted_while_frozen():
    node = opened()
    later = jobs.entry(SPEC, generation=2)
    begin = jobs.begin(node.rounds.entry, "a")
    node.begin(begin)
    node.rounds.freeze(later)
    for refused in (begin, jobs.begin(later, "a")):
        with pytest.raises(StaleGeneration):
            node.rounds.begin(refused)
        with pytest.raises(StaleGeneration):
            node.rounds.admit(refused, 0, 0, 1)
    assert node.rounds.repeat() == []
    assert node.rounds.measured({0: 1.0}) == []


def test_a_worker_that_is_not_of_the_generation_is_refused():
    node = opened(workers="ab", leaving="b")
    for stranger in "bx":
        with pytest.raises(StaleGeneration):
            node.rounds.begin(jobs.begin(node.rounds.entry, stranger))


@pytest.mark.parametrize(("step", "push"), [(-1, True), (2, True), (7, False), (2, False)])
def test_a_step_that_a_worker_cannot_be_at_is_refused(step, push):
    node = opened()
    with pytest.raises(InvalidRequest, match=f"asks shard s0 for step {step}"):
        node.rounds.begin(jobs.begin(node.rounds.entry, "a", step, push=push))


def test_a_pull_is_acknowledged_whether_the_step_is_decided_or_not():
    node = opened()
    entry = node.rounds.entry
    now, _ = node.rounds.begin(jobs.begin(entry, "a", 0, push=False))
    later, _ = node.rounds.begin(jobs.begin(entry, "a", 1, push=False))
    assert (now.complete, later.complete) == (True, False)
    assert not node.rounds.begins


@pytest.mark.parametrize(
    ("index", "start", "count"),
    [(0, 1, 2), (0, 0, 7), (0, 0, 0), (3, 0, 1), (1, 0, 1), (0, 6, 1)],
    ids=["gap", "too long", "empty", "no such slice", "held elsewhere", "beyond the end"],
)
def test_elements_that_cannot_come_now_are_refused(index, start, count):
    entry = jobs.entry(SPEC, shards=("s0", "s1"), placement=(0, 1, 0))
    node = Node("s0")
    node.open(jobs.plan(entry))
    begin = jobs.begin(entry, "a")
    node.begin(begin)
    with pytest.raises(InvalidFrame):
        node.rounds.admit(begin, index, start, count)
    assert node.push(begin, 0, 0, 6)


def test_elements_of_a_parameter_that_the_push_called_absent_are_dropped():
    node = opened(workers="ab")
    begin = jobs.begin(node.rounds.entry, "a", present=[1])
    node.begin(begin)
    assert node.rounds.admit(begin, 0, 0, 6) is None


_SETTINGS = AdafactorStep(eps1=1e-30, eps2=1e-3, clip_threshold=1.0)


def settings_with(**changes) -> tuple[GroupStep, ...]:
    step = jobs.group_step()
    return (dataclasses.replace(step, adafactor=dataclasses.replace(_SETTINGS, **changes)),)


def schedules_with(**changes) -> tuple[GroupStep, ...]:
    step = jobs.group_step()
    schedules = tuple(dataclasses.replace(one, **changes) for one in step.schedules)
    return (dataclasses.replace(step, schedules=schedules),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"present": b""}, "presence bit"),
        ({"present": b"\x07\x00"}, "presence bit"),
        ({"share": 0.0}, "share"),
        ({"share": -1.0}, "share"),
        ({"share": math.nan}, "share"),
        ({"share": math.inf}, "share"),
        ({"groups": ()}, "each of 1 groups"),
        ({"groups": (GroupStep(),)}, "settings of the job's optimizer"),
        ({"groups": (jobs.group_step([2, 3]),)}, r"step counts \[1\]"),
        ({"groups": settings_with(weight_decay_mode=WeightDecayMode.UNSPECIFIED)}, "weight decay"),
        ({"groups": settings_with(eps1=math.nan)}, "finite numbers"),
        ({"groups": settings_with(eps2=math.inf)}, "finite numbers"),
        ({"groups": settings_with(lr=math.nan)}, "finite numbers"),
        ({"groups": settings_with(clip_threshold=0.0)}, "finite numbers"),
        ({"groups": settings_with(clip_threshold=math.nan)}, "finite numbers"),
        ({"groups": schedules_with(beta2=math.nan)}, "finite numbers"),
        ({"groups": schedules_with(rho=math.inf)}, "finite numbers"),
        ({"dtypes": ()}, "formats|format"),
        ({"dtypes": (DType.UNSPECIFIED,)}, "format"),
        ({"dtypes": (DType.FLOAT32, DType.FLOAT32)}, "format"),
    ],
)
def test_a_push_whose_record_could_not_be_applied_is_refused(changes, words):
    node = opened()
    begin = dataclasses.replace(jobs.begin(node.rounds.entry, "a"), **changes)
    with pytest.raises(InvalidRequest, match=words):
        node.rounds.begin(begin)
    assert not node.rounds.begins


def test_clipping_may_be_off():
    node = opened()
    node.push_all(jobs.begin(node.rounds.entry, "a", groups=settings_with(clip_threshold=math.inf)))
    assert node.records


@pytest.mark.parametrize(
    "changes",
    [
        {"sender": "s7"},
        {"sender": "s0", "slices": (0, 2), "squared_sums": (1.0, 1.0)},
        {"slices": (1,), "squared_sums": ()},
        {"slices": (0, 1), "squared_sums": (1.0, 1.0)},
        {"slices": (), "squared_sums": ()},
        {"workers": ("a", "b")},
    ],
    ids=["nobody", "itself", "torn", "slices of others", "slices missing", "other workers"],
)
def test_a_report_that_does_not_fit_the_generation_is_refused_and_leaves_nothing(changes):
    entry = jobs.entry(SPEC, shards=("s0", "s1"))
    node = Node("s0")
    node.open(jobs.plan(entry))
    good = Report(
        job=jobs.JOB,
        generation=1,
        sender="s1",
        step=1,
        workers=("a",),
        finite=True,
        slices=(1,),
        squared_sums=(1.0,),
    )
    with pytest.raises(InvalidRequest):
        node.rounds.exchange(dataclasses.replace(good, **changes))
    node.push_all(jobs.begin(entry, "a"))
    assert node.records == []
    node.carry_out(node.rounds.exchange(good))
    assert len(node.records) == 1


@pytest.mark.parametrize(("promised", "reported"), [(2, 1), (1, 2)])
def test_a_report_of_another_generation_is_refused(promised, reported):
    node = Node("s0")
    node.open(jobs.plan(jobs.entry(SPEC, generation=promised, shards=("s0", "s1"))))
    report = Report(
        job=jobs.JOB,
        generation=reported,
        sender="s1",
        step=1,
        workers=("a",),
        finite=True,
        slices=(1,),
        squared_sums=(1.0,),
    )
    with pytest.raises(StaleGeneration):
        node.rounds.exchange(report)


def test_a_report_that_comes_while_frozen_is_refused():
    node = opened(shards=("s0", "s1"))
    node.rounds.freeze(jobs.entry(SPEC, generation=2, shards=("s0", "s1")))
    report = Report(
        job=jobs.JOB,
        generation=2,
        sender="s1",
        step=1,
        workers=("a",),
        finite=True,
        slices=(1,),
        squared_sums=(1.0,),
    )
    with pytest.raises(StaleGeneration, match="frozen"):
        node.rounds.exchange(report)


def test_before_any_freeze_there_is_nothing():
    rounds = Rounds("s0")
    assert (rounds.mine, rounds.peers, rounds.version) == ((), (), -1)
    assert not rounds.planned
    with pytest.raises(StaleGeneration):
        rounds.check(0, "a")


@pytest.mark.parametrize("there", ["", "a", "b", "c", "ab", "ac", "bc"])
def test_every_worker_of_a_round_is_waited_for(there):
    node = opened(workers="abc")
    for worker in there:
        assert node.begin(jobs.begin(node.rounds.entry, worker, present=[]))
    assert node.records == []
    for worker in "abc":
        node.begin(jobs.begin(node.rounds.entry, worker, present=[]))
    assert len(node.records) == 1
