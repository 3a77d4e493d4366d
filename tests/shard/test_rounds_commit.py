"""Reports, the commit, and what the rounds refuse."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.clusters import Cluster, Node
from tests.shard.pushers import SHAPES, SPEC, dice, opened, presences

from adashard.wire.errors import InvalidFrame, InvalidRequest, StaleGeneration
from adashard.wire.messages import (
    AdafactorStep,
    Entry,
    Exchange,
    Frozen,
    FullSums,
    GroupStep,
    Outcome,
    Report,
)
from adashard.wire.placement import Node as Subtree
from adashard.wire.placement import cut
from adashard.wire.spec import DType, EpsPlacement, Rounding, WeightDecayMode
from adashard_server.shard.instructions import Measure, Send
from adashard_server.shard.partials import Finding
from adashard_server.shard.records import bit, completed, draft_record, present_in_any, skipped
from adashard_server.shard.rounds import Rounds

# --- reports and the commit ----------------------------------------------------------------------



@st.composite
def entries(draw) -> Entry:
    """Generations of a job whose larger parameters may be cut, placed anyhow."""
    count = draw(st.integers(1, 4))
    job = jobs.spec(
        *SHAPES,
        (2, 20),
        (33,),
        slice_bytes=draw(st.sampled_from([64, 1 << 20])),
        eps_placement=draw(st.sampled_from([EpsPlacement.ADDED, EpsPlacement.CLAMPED])),
    )
    placement = draw(st.lists(st.integers(0, count - 1), min_size=9, max_size=9))
    return jobs.entry(
        job,
        workers="ab",
        shards=[f"s{n}" for n in range(count)],
        placement=placement[: len(cut(job))],
    )


bounds = st.sampled_from([0.0, 3.0])


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
