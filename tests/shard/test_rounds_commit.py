"""Reports, the commit, and what the rounds refuse."""

from __future__ import annotations

import dataclasses
import math

from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.clusters import Cluster, Node
from tests.shard.pushers import SPEC, bounds, dice, entries, opened, presences

from adashard.wire.control import Frozen, FullSums
from adashard.wire.messages import Exchange, Outcome, Report
from adashard.wire.placement import Node as Subtree
from adashard.wire.placement import cut
from adashard_server.shard.instructions import Send
from adashard_server.shard.partials import Finding
from adashard_server.shard.records import bit, completed, draft_record, present_in_any

# --- reports and the commit ----------------------------------------------------------------------


@given(entries(), dice, st.integers(1, 3), bounds)
def test_all_shards_commit_the_same_record_however_reports_are_lost_and_doubled(
    entry, chooser, steps, bound
):
    """Through one, two or three exchanges a step, whose reports overtake each other."""
    cluster = Cluster(entry)
    for step in range(1, steps + 1):
        cluster.push_all(step, max_grad_norm=bound)
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
        assert not any(node.refused for node in cluster.nodes.values())
        for node in cluster.nodes.values():
            node.settle()
            assert set(node.rounds.versions.values()) == {step}


def assert_all_or_none(cluster: Cluster, step: int) -> None:
    """Who has committed has everybody's promise: their sums are full, their reports are kept."""
    if any(len(records) == step for records in cluster.records):
        for node in cluster.nodes.values():
            assert node.rounds.own_report(step, Exchange.PARTIALS) is not None


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
    assert node.rounds.own_report(1, Exchange.PARTIALS) == send.report
    assert node.rounds.own_report(0, Exchange.PARTIALS) is None
    assert node.rounds.repeat() == []
    node.settle()
    assert node.rounds.own_report(1, Exchange.PARTIALS) == send.report
    assert node.committed[0].squared_sum == sum(send.report.squared_sums) == 2.0
    assert node.rounds.repeat() == []
    assert node.rounds.exchange(report) == []
    node.rounds.freeze(jobs.entry(SPEC, generation=2, shards=("s0", "s1")))
    assert node.rounds.own_report(1, Exchange.PARTIALS) is None


def test_a_report_that_is_here_already_is_not_wanted_again():
    cluster = Cluster(jobs.entry(SPEC, shards=("s0", "s1")))
    first, second = cluster.nodes.values()
    first.push_all(jobs.begin(cluster.entry, "a"))
    cluster.collect_sent()
    second.carry_out(second.rounds.exchange(first.rounds.own_report(1, Exchange.PARTIALS)))
    second.push_all(jobs.begin(cluster.entry, "a", receiver="s1"))
    assert second.sent == [
        Send(second.rounds.own_report(1, Exchange.PARTIALS), ("s0",), frozenset())
    ]
    assert second.records
    assert first.rounds.repeat() == [
        Send(first.rounds.own_report(1, Exchange.PARTIALS), ("s1",), frozenset({"s1"}))
    ]


@given(entries(), st.integers(0, 10), st.sampled_from([math.nan, math.inf]), bounds)
def test_what_is_not_finite_on_one_shard_is_a_skip_on_all(entry, broken, square, bound):
    broken %= len(entry.placement)
    cluster = Cluster(entry)
    for node in cluster.nodes.values():
        node.square = lambda index: square if index == broken else 1.0
    cluster.push_all(max_grad_norm=bound)
    cluster.deliver_all()
    for records in cluster.records:
        (record,) = records
        assert (record.outcome, record.step_counts) == (Outcome.SKIP, (0,) * 5)
        assert (record.squared_norm, record.norm_factor, record.partials) == (0.0, 1.0, ())
    for node in cluster.nodes.values():
        assert not any(node.rounds.updates(index) for index in node.rounds.mine)
        node.settle()
        assert node.rounds.version == 1
        node.square = float
    cluster.push_all(2, max_grad_norm=bound)
    cluster.deliver_all()
    undisturbed = Cluster(entry, base=1)
    undisturbed.push_all(2, max_grad_norm=bound)
    undisturbed.deliver_all()
    assert [records[-1] for records in cluster.records] == [
        record for (record,) in undisturbed.records
    ]


@given(entries(), bounds)
def test_a_record_is_the_same_whoever_forms_it_and_however_slices_are_placed(entry, bound):
    alone = dataclasses.replace(
        entry, shards=entry.shards[:1], placement=(0,) * len(entry.placement)
    )
    clusters = [Cluster(one) for one in (entry, alone)]
    for cluster in clusters:
        for node in cluster.nodes.values():
            node.square = lambda index: 0.1 * 3.0**index
        cluster.push_all(max_grad_norm=bound)
        cluster.deliver_all()
    many, one = (cluster.records for cluster in clusters)
    assert many == one * len(many)


def reports_of(placement, squares) -> list[tuple[Report, list[Subtree]]]:
    """Reports of shards that each hold some slices of parameters that are not split."""
    found = []
    for shard in sorted(set(placement)):
        mine = tuple(index for index, owner in enumerate(placement) if owner == shard)
        report = Report(
            job=jobs.JOB,
            generation=1,
            sender=f"s{shard}",
            step=1,
            workers=("a", "b"),
            finite=True,
            slices=mine,
            squared_sums=tuple(squares[index] for index in mine),
        )
        found.append((report, [Subtree(slice=index, count=1) for index in mine]))
    return found


@given(dice, st.integers(1, 4))
def test_squared_sums_are_added_in_the_order_of_parameters_whatever_order_reports_are_in(
    chooser, count
):
    job = jobs.spec(*[(1,)] * 5)
    entry = jobs.entry(job, workers="ab")
    begins = [jobs.begin(entry, worker, share=share) for worker, share in (("a", 3.0), ("b", 0.1))]
    draft = draft_record(1, begins, (0,) * 5)
    squares = [0.1, 0.2, 1e-9, 1e9, 0.3]
    many = reports_of([chooser.randrange(count) for _ in squares], squares)
    chooser.shuffle(many)
    record = completed(draft, Exchange.PARTIALS, many, cut(job), 0.0)
    assert record == dataclasses.replace(draft, squared_norm=0.1 + 0.2 + 1e-9 + 1e9 + 0.3)


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
    assert record.squared_norm == 0.0 + 1.0 + 2.0


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
    for worker in "ab":
        node.push_all(jobs.begin(node.rounds.entry, worker))
    (early,), (known,) = node.measured[:1], node.records
    broken = {index: Finding(math.nan) for index in range(3)}
    assert node.rounds.measured(early, broken) == []
    node.settle()
    assert node.rounds.measured(early, broken) == []
    node.push_all(jobs.begin(node.rounds.entry, "a", 2))
    assert node.rounds.measured(early, broken) == []
    node.push_all(jobs.begin(node.rounds.entry, "b", 2))
    assert node.rounds.measured(early, broken) == []
    assert [record.outcome for record in node.records] == [Outcome.APPLY] * 2
    assert node.records[0] == known
