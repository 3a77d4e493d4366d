"""The exchanges of a step, without tensors: which there are, what is believed, what they add."""

from __future__ import annotations

import dataclasses
import math
from operator import add

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.clusters import Cluster, Node
from tests.shard.pushers import SPEC, bounds, dice, entries

from adashard.wire.errors import InvalidRequest
from adashard.wire.messages import Exchange, Outcome, Report
from adashard.wire.placement import cut, merged, nodes
from adashard.wire.spec import EpsPlacement
from adashard_server.shard.partials import added
from adashard_server.shard.records import completed, draft_record

# A matrix that is cut along its columns, a vector that is cut, and one that is not.
CUT = jobs.spec((2, 20), (33,), (5,), slice_bytes=64)
CLAMPED = dataclasses.replace(
    CUT,
    groups=jobs.spec(eps_placement=EpsPlacement.CLAMPED).groups,
)
ON_TWO = (0, 0, 1, 1, 0, 1, 0, 1, 1)
MINE, THEIRS = (0, 1, 4, 6), (2, 3, 5, 7, 8)


def on_two(job=CUT, **options) -> Cluster:
    return Cluster(jobs.entry(job, shards=("s0", "s1"), placement=ON_TWO, **options))


def exchanges_of(cluster: Cluster, **options) -> list[Exchange]:
    """The exchanges of a step, in the order in which the first shard reports."""
    cluster.push_all(**options)
    cluster.collect_sent()
    sent = []
    while cluster.flying:
        report = cluster.flying[0][1]
        sent += [report.exchange] if report.sender == "s0" else []
        cluster.deliver(0)
    return list(dict.fromkeys(sent))


# --- which there are -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "bound", "expected"),
    [
        (CUT, 0.0, [Exchange.PARTIALS]),
        (CUT, 1.0, [Exchange.NORM, Exchange.PARTIALS]),
        (CLAMPED, 0.0, [Exchange.PARTIALS, Exchange.CLAMPED]),
        (CLAMPED, 1.0, [Exchange.NORM, Exchange.PARTIALS, Exchange.CLAMPED]),
    ],
)
def test_settings_fix_the_list_of_exchanges(job, bound, expected):
    assert exchanges_of(on_two(job), max_grad_norm=bound) == expected


@pytest.mark.parametrize(
    "job",
    [
        jobs.spec((2, 20), slice_bytes=1 << 20, eps_placement=EpsPlacement.CLAMPED),
        jobs.spec((33,), slice_bytes=64, eps_placement=EpsPlacement.CLAMPED),
        jobs.spec((8, 3, 2), slice_bytes=64, eps_placement=EpsPlacement.CLAMPED),
    ],
    ids=["not split", "not factored", "cut into whole matrices"],
)
def test_a_bound_that_each_slice_can_look_after_needs_no_exchange(job):
    placement = [index % 2 for index in range(len(cut(job)))]
    shards = [f"s{owner}" for owner in sorted(set(placement))]
    cluster = Cluster(jobs.entry(job, shards=shards, placement=placement))
    assert Exchange.CLAMPED not in exchanges_of(cluster)
    assert all(len(records) == 1 for records in cluster.records)


def test_only_split_factored_parameters_that_are_present_are_measured_for_their_bound():
    cluster = on_two(CLAMPED)
    cluster.push_all()
    cluster.deliver_all()
    node = cluster.nodes["s0"]
    asked = {
        exchange: [i for one in node.measured if one.exchange is exchange for i in one.slices]
        for exchange in Exchange
    }
    assert asked[Exchange.PARTIALS] == [*MINE]
    assert asked[Exchange.CLAMPED] == [0, 1]
    node.settle()
    node.measured.clear()
    node.push_all(jobs.begin(cluster.entry, "a", 2, present=[2]))
    assert [one.slices for one in node.measured] == []


def test_sums_that_are_taken_element_by_element_replace_those_of_the_partials():
    """Of the parameters whose bound may bind; the others' are as the partials had them."""
    cluster = on_two(CLAMPED)
    cluster.push_all()
    cluster.deliver_all()
    for (record,) in cluster.records:
        matrix, vector = (partial.update_squared_sum for partial in record.partials)
        assert matrix == added_along_the_tree([0.7 * index for index in range(4)])
        assert vector == added_along_the_tree([0.3 * index for index in range(4, 8)])


def test_the_bound_of_the_lowest_rank_counts():
    cluster = on_two(workers="ab")
    for worker, bound in (("a", 0.0), ("b", 9.0)):
        for name, node in cluster.nodes.items():
            node.push_all(jobs.begin(cluster.entry, worker, receiver=name, max_grad_norm=bound))
    cluster.deliver_all()
    assert cluster.records[0][0].norm_factor == 1.0
    assert {m.exchange for m in cluster.nodes["s0"].measured} == {Exchange.PARTIALS}


# --- what they add -------------------------------------------------------------------------------

squares = st.floats(0.0, 1e30)


@given(entries(), dice, bounds)
def test_a_shard_tells_one_partial_and_one_squared_sum_for_each_whole_subtree(
    entry, chooser, bound
):
    cluster = Cluster(entry)
    cluster.push_all(max_grad_norm=bound)
    cluster.collect_sent()
    slices = cut(entry.spec)
    while cluster.flying:
        report = cluster.flying[0][1]
        held = nodes(slices, report.slices)
        assert len(report.squared_sums) == len(held)
        if report.exchange is Exchange.PARTIALS:
            told = [(one.slice, one.count) for one in report.partials]
            assert told == [(n.slice, n.count) for n in held if slices[n.slice].split]
        cluster.deliver(0)
    for (record,) in cluster.records:
        split = {one.first: one.count for one in slices if one.split}
        assert {one.slice: one.count for one in record.partials} == split


@given(st.lists(squares, min_size=9, max_size=9), dice)
def test_squared_sums_have_the_same_bits_however_they_are_grouped(values, chooser):
    slices = cut(CUT)
    owners = [chooser.randrange(4) for _ in values]
    leaves = [(index, 1, value) for index, value in enumerate(values)]
    told = [
        part
        for owner in range(4)
        for part in merged(slices, [one for one in leaves if owners[one[0]] == owner], add)
    ]
    alone = merged(slices, leaves, add)
    assert merged(slices, sorted(told), add) == alone
    tree = [added_along_the_tree(values[0:4]), added_along_the_tree(values[4:8]), values[8]]
    assert [total for _, _, total in alone] == tree


def added_along_the_tree(values: list[float]) -> float:
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return added_along_the_tree(values[:half]) + added_along_the_tree(values[half:])


def test_numbers_are_added_from_the_first_to_the_last_without_compensation():
    assert added([1e16, 1.0, 1.0, -1e16]) == 0.0 == ((0.0 + 1e16) + 1.0 + 1.0) - 1e16


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9),
    st.sampled_from([1e-9, 0.5, 7.0, 1e9]),
)
def test_the_norm_is_bounded_as_torch_does_it(numbers, bound):
    job = jobs.spec((len(numbers),))
    gradient = torch.tensor(numbers, dtype=torch.float64)
    report = Report(
        job=jobs.JOB,
        generation=1,
        sender="s0",
        step=1,
        workers=("a",),
        finite=True,
        slices=(0,),
        squared_sums=(float(gradient.square().sum()),),
        exchange=Exchange.NORM,
    )
    begin = jobs.begin(jobs.entry(job), "a")
    draft = draft_record(1, [begin], (0,))
    told = [(report, nodes(cut(job), (0,)))]
    record = completed(draft, Exchange.NORM, told, cut(job), bound)
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(weight, bound)
    assert math.isclose(record.squared_norm, float(norm) ** 2, rel_tol=1e-12, abs_tol=1e-300)
    torch.testing.assert_close(record.norm_factor * gradient, weight.grad, rtol=1e-12, atol=0.0)
    assert record.norm_factor <= 1.0


@pytest.mark.parametrize("bound", [0.0, 1e-3, 1e9])
def test_the_record_tells_the_norm_before_it_was_bounded(bound):
    cluster = on_two()
    cluster.push_all(max_grad_norm=bound)
    cluster.deliver_all()
    (record,) = cluster.records[0]
    assert record.squared_norm == (0.0 + 1.0 + 2.0 + 3.0) + (4.0 + 5.0 + 6.0 + 7.0) + 8.0
    assert record.norm_factor == min(1.0, bound / (6.0 + 1e-6) if bound else 1.0)
    assert cluster.nodes["s0"].committed[0].squared_sum == 0.0 + 1.0 + 4.0 + 6.0


# --- what is believed ----------------------------------------------------------------------------


def theirs(cluster: Cluster, exchange: Exchange) -> Report:
    """The other shard's report, as it would have it."""
    report = cluster.nodes["s1"].rounds.own_report(1, exchange)
    assert report is not None
    return report


def pushed(job=CUT, **options) -> Cluster:
    """Two shards whose sums are full; the second has reported, and the first not heard of it."""
    cluster = on_two(job)
    for name, node in cluster.nodes.items():
        node.push_all(jobs.begin(cluster.entry, "a", receiver=name, **options))
    return cluster


def with_first_partial(report: Report, **changes) -> Report:
    first, *rest = report.partials
    return dataclasses.replace(report, partials=(dataclasses.replace(first, **changes), *rest))


WRONG_PARTIALS = {
    "too few": lambda report: dataclasses.replace(report, partials=report.partials[1:]),
    "none": lambda report: dataclasses.replace(report, partials=()),
    "doubled": lambda report: dataclasses.replace(report, partials=report.partials[:1] * 2),
    "other slice": lambda report: with_first_partial(report, slice=0),
    "other count": lambda report: with_first_partial(report, count=1),
    "short squares": lambda report: with_first_partial(report, squares=bytes(4)),
    "short ratios": lambda report: with_first_partial(report, ratios=b""),
    "long": lambda report: with_first_partial(report, squares=bytes(12), ratios=bytes(12)),
    "not of floats": lambda report: with_first_partial(report, squares=bytes(7), ratios=bytes(7)),
}


@pytest.mark.parametrize("wrong", WRONG_PARTIALS.values(), ids=WRONG_PARTIALS)
@pytest.mark.parametrize("early", [True, False])
def test_a_report_with_partials_that_cannot_be_is_dropped_and_the_round_ends_with_the_right_one(
    wrong, early
):
    """It may come before this shard knows which parameters are present, and then it waits."""
    donor = pushed()
    good = theirs(donor, Exchange.PARTIALS)
    node = on_two().nodes["s0"]
    begin = jobs.begin(node.rounds.entry, "a")
    if early:
        node.carry_out(node.rounds.exchange(wrong(good)))
    node.push_all(begin)
    if not early:
        node.carry_out(node.rounds.exchange(wrong(good)))
    assert [refused.sender for refused in node.refused] == ["s1"]
    assert node.records == []
    node.sent.clear()
    node.carry_out(node.rounds.repeat())
    assert node.sent[0].wanted == {"s1"}
    node.carry_out(node.rounds.exchange(good))
    assert len(node.records) == 1


def test_a_report_of_other_present_parameters_is_dropped():
    donor = pushed(present=[0])
    node = pushed().nodes["s0"]
    node.carry_out(node.rounds.exchange(theirs(donor, Exchange.PARTIALS)))
    assert (len(node.refused), node.records) == (1, [])


@pytest.mark.parametrize("count", [0, 1, 5, 9])
def test_a_report_with_another_number_of_squared_sums_is_refused(count):
    cluster = pushed()
    node, good = cluster.nodes["s0"], theirs(cluster, Exchange.PARTIALS)
    assert len(good.squared_sums) == 4
    with pytest.raises(InvalidRequest, match=f"{count} squared sums for 4 nodes"):
        node.rounds.exchange(dataclasses.replace(good, squared_sums=(1.0,) * count))
    node.carry_out(node.rounds.exchange(good))
    assert len(node.records) == 1


def test_what_is_not_finite_needs_no_partials():
    cluster = pushed()
    good = theirs(cluster, Exchange.PARTIALS)
    node = cluster.nodes["s0"]
    broken = dataclasses.replace(good, finite=False, partials=())
    node.carry_out(node.rounds.exchange(broken))
    assert node.refused == []
    assert node.records[0].outcome is Outcome.SKIP


# --- their order ---------------------------------------------------------------------------------


def test_a_report_of_the_next_exchange_may_come_before_this_one_is_concluded():
    """Of two shards, one has both reports of the norm; its partials overtake its norm."""
    cluster = pushed(CLAMPED, max_grad_norm=1.0)
    first, second = cluster.nodes.values()
    second.carry_out(second.rounds.exchange(first.rounds.own_report(1, Exchange.NORM)))
    first.carry_out(first.rounds.exchange(theirs(cluster, Exchange.PARTIALS)))
    assert first.rounds.own_report(1, Exchange.PARTIALS) is None
    first.carry_out(first.rounds.exchange(theirs(cluster, Exchange.NORM)))
    assert first.rounds.own_report(1, Exchange.PARTIALS) is not None
    assert first.rounds.own_report(1, Exchange.CLAMPED) is not None
    for exchange in (Exchange.PARTIALS, Exchange.CLAMPED):
        second.carry_out(second.rounds.exchange(first.rounds.own_report(1, exchange)))
    first.carry_out(first.rounds.exchange(theirs(cluster, Exchange.CLAMPED)))
    assert first.records == second.records
    assert len(first.records) == 1


def test_what_is_repeated_is_the_report_at_hand_and_each_older_one_is_there_for_who_asks():
    cluster = pushed(CLAMPED, max_grad_norm=1.0)
    first, second = cluster.nodes.values()
    assert first.rounds.repeat()[0].report.exchange is Exchange.NORM
    first.carry_out(first.rounds.exchange(theirs(cluster, Exchange.NORM)))
    assert first.rounds.repeat()[0].report.exchange is Exchange.PARTIALS
    assert second.rounds.repeat()[0].report.exchange is Exchange.NORM
    assert first.rounds.own_report(1, Exchange.NORM) is not None
    first.carry_out(first.rounds.exchange(theirs(cluster, Exchange.NORM)))
    assert first.rounds.repeat()[0].report.exchange is Exchange.PARTIALS


def test_a_shard_reports_once_all_that_is_present_is_full_and_measured():
    node = Node("s0")
    node.open(jobs.plan(jobs.entry(CUT, shards=("s0", "s1"), placement=ON_TWO)))
    begin = jobs.begin(node.rounds.entry, "a", present=[0, 2], max_grad_norm=1.0)
    node.begin(begin)
    for index in (1, 0):
        assert node.sent == []
        node.push(begin, index, 0, 10)
    assert [one.slices for one in node.measured] == [(1,), (0,)]
    (send,) = node.sent
    assert send.report.exchange is Exchange.NORM
    assert send.report.squared_sums == (0.0 + 1.0, 0.0, 0.0)


def test_a_step_without_split_parameters_has_no_partials():
    cluster = Cluster(jobs.entry(SPEC, shards=("s0", "s1")))
    cluster.push_all()
    cluster.deliver_all()
    assert [record.partials for (record,) in cluster.records] == [(), ()]
