"""What the rounds of one job on one shard refuse."""

from __future__ import annotations

import dataclasses
import math

import pytest
from tests.shard import jobs
from tests.shard.clusters import Node
from tests.shard.pushers import SPEC, opened

from adashard.wire.errors import InvalidFrame, InvalidRequest, StaleGeneration
from adashard.wire.messages import AdafactorStep, Exchange, GroupStep, Report
from adashard.wire.spec import DType, Rounding, WeightDecayMode
from adashard_server.shard.instructions import Measure
from adashard_server.shard.partials import Finding
from adashard_server.shard.records import draft_record
from adashard_server.shard.rounds import Rounds


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
    draft = draft_record(1, [begin], (0, 0, 0))
    measure = Measure((0,), Exchange.PARTIALS, draft)
    assert node.rounds.measured(measure, {0: Finding(1.0)}) == []


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
    assert not node.rounds.sums.begins


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
        ({"rounding": Rounding.UNSPECIFIED}, "rounded"),
        ({"sparse": b"\x00\x00"}, "rows are sparse"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
    ],
)
def test_a_push_whose_record_could_not_be_applied_is_refused(changes, words):
    node = opened()
    begin = dataclasses.replace(jobs.begin(node.rounds.entry, "a"), **changes)
    with pytest.raises(InvalidRequest, match=words):
        node.rounds.begin(begin)
    assert not node.rounds.sums.begins


def test_settings_of_a_group_without_parameters_are_looked_at_as_well():
    """They stand in the record, from which every slice makes its step."""
    job = jobs.spec((3,))
    job = dataclasses.replace(job, groups=job.groups * 2)
    node = Node("s0")
    node.open(jobs.plan(jobs.entry(job)))
    good = jobs.group_step()
    unknown = settings_with(weight_decay_mode=WeightDecayMode.UNSPECIFIED)[0]
    for bad in (GroupStep(), unknown):
        with pytest.raises(InvalidRequest):
            node.rounds.begin(jobs.begin(node.rounds.entry, "a", groups=(good, bad)))
    node.push_all(jobs.begin(node.rounds.entry, "a", groups=(good, jobs.group_step([]))))
    assert len(node.records) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"present": jobs.bits([0, 1], 3)},
        {"share": 2.0},
        {"sparse": jobs.bits([0], 3)},
        {"groups": (jobs.group_step(lr=0.5),)},
        {"max_grad_norm": 1.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_gradient_of_a_worker_for_the_same_step_is_refused(changes):
    """A part of the first may be in the sums, also after a change of generation."""
    node = opened(workers="ab")
    begin = jobs.begin(node.rounds.entry, "a")
    node.begin(begin)
    node.begin(dataclasses.replace(begin, version=0))
    with pytest.raises(InvalidRequest, match="worker a pushes another gradient for step 1"):
        node.begin(dataclasses.replace(begin, **changes))
    later = jobs.entry(SPEC, generation=2, workers="abc")
    node.open(jobs.plan(later))
    again = jobs.begin(later, "a")
    with pytest.raises(InvalidRequest, match="another gradient"):
        node.begin(dataclasses.replace(again, **changes))
    node.begin(again)


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
        {"exchange": Exchange.UNSPECIFIED},
    ],
    ids=[
        "nobody",
        "itself",
        "torn",
        "slices of others",
        "slices missing",
        "other workers",
        "no exchange",
    ],
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
    assert (rounds.mine, rounds.version) == ((), -1)
    assert rounds.own_report(0, Exchange.PARTIALS) is None
    assert rounds.repeat() == []
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
