"""A shard process as the edges see it: its jobs, draining, and what it tells unasked."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from tests.shard import jobs
from tests.shard.tables import Table, push, talked, together, watched

from adashard.wire.control import (
    Bye,
    Freeze,
    Open,
    Opened,
    Planned,
    PlanRequest,
    Stale,
    Standing,
    StepSummary,
)
from adashard.wire.errors import Draining, InvalidRequest, StaleGeneration
from adashard.wire.messages import Exchange, ExchangeRequest, Partial, Report

SPEC = jobs.spec((4,), (3,))
WEIGHTS = {0: torch.ones(4), 1: torch.ones(3)}
GRADIENTS = {0: torch.arange(4.0), 1: torch.arange(3.0)}
NOTHING = {"weight_squared_sum": 0.0, "update_squared_sum": 0.0, "least": 1.0}


def opened(names=("s0",), **options) -> Table:
    table = Table(names)
    table.open(jobs.plan(jobs.entry(SPEC, shards=names, **options)), WEIGHTS)
    return table


def step(table: Table, worker: str = "a", number: int = 1):
    return table.step(jobs.begin(table.entry, worker, number, version=number - 1), GRADIENTS)


def test_every_moment_of_a_change_is_answered():
    table = Table()
    (shard,) = table.shards.values()
    plan = jobs.plan(jobs.entry(SPEC))
    assert shard.handle(Freeze(entry=plan.entry)).generation == 1
    assert shard.handle(PlanRequest(plan=plan)) is None
    table.upload(shard, plan, WEIGHTS)
    assert table.told == [Planned(job=jobs.JOB, generation=1)]
    assert shard.handle(PlanRequest(plan=plan)) == Planned(job=jobs.JOB, generation=1)
    assert shard.handle(Open(plan=plan)) == Opened(job=jobs.JOB, generation=1)


def test_the_newest_entry_is_kept_for_a_coordinator_that_has_none_and_says_what_was_opened():
    table = Table()
    (shard,) = table.shards.values()
    assert shard.entries() == ()
    first = dataclasses.replace(jobs.entry(SPEC), opened=False)
    shard.handle(Freeze(entry=first))
    assert shard.entries() == (first,)
    table.open(jobs.plan(first), WEIGHTS)
    assert shard.entries() == (dataclasses.replace(first, opened=True),)
    second = dataclasses.replace(first, generation=2, opened=True)
    shard.handle(Freeze(entry=second))
    assert shard.entries() == (second,)
    shard.handle(Bye(job=jobs.JOB, generation=2))
    assert shard.entries() == ()


def test_a_plan_or_an_open_of_a_generation_that_is_not_promised_is_not_answered():
    table = opened(generation=3)
    (shard,) = table.shards.values()
    for generation in (2, 4):
        plan = jobs.plan(jobs.entry(SPEC, generation=generation))
        assert shard.handle(PlanRequest(plan=plan)) is None
        assert shard.handle(Open(plan=plan)) is None
    assert shard.handle(Freeze(entry=jobs.entry(SPEC))) == Stale(job=jobs.JOB, promised=3)


def test_a_renewal_says_where_the_shard_stands_and_what_it_holds():
    table = opened()
    step(table)
    renewal = table.shards["s0"].renewal()
    assert renewal.standings == (Standing(job=jobs.JOB, generation=1, version=1),)
    (holding,) = renewal.holdings
    assert (holding.job, holding.weight_bytes) == (jobs.JOB, 28)
    assert holding.state_bytes == {"vector": 28}
    assert not renewal.draining


def test_a_shard_without_weights_yet_holds_nothing():
    table = Table()
    table.freeze(jobs.entry(SPEC))
    (holding,) = table.shards["s0"].renewal().holdings
    assert (holding.weight_bytes, holding.state_bytes) == (0, {})


@pytest.mark.parametrize("job", [jobs.JOB, ""])
def test_bye_drops_a_job_or_all_of_them(job):
    table = opened()
    (shard,) = table.shards.values()
    assert shard.handle(Bye(job=job, generation=2)) is None
    assert shard.renewal().standings == ()
    with pytest.raises(StaleGeneration, match="does not hold job 'job'"):
        step(table)


def test_bye_of_another_job_drops_nothing():
    table = opened()
    table.shards["s0"].handle(Bye(job="other", generation=2))
    assert step(table).record.step == 1


def test_a_call_that_is_meant_for_another_process_is_refused():
    table = opened()
    (shard,) = table.shards.values()
    with pytest.raises(StaleGeneration):
        shard.begin(jobs.begin(table.entry, "a", receiver="s7"))
    with pytest.raises(StaleGeneration):
        shard.exchange(ExchangeRequest(receiver="s7", report=report(table)))


def report(table: Table, **changes) -> Report:
    good = Report(
        job=jobs.JOB,
        generation=table.entry.generation,
        sender="s1",
        step=1,
        workers=("a",),
        finite=True,
        slices=(1,),
        squared_sums=(1.0,),
    )
    return dataclasses.replace(good, **changes)


# --- draining ------------------------------------------------------------------------------------


def test_a_draining_shard_begins_no_round_but_lets_weights_be_pulled():
    table = opened()
    shard = table.shards["s0"]
    shard.drain()
    shard.drain()
    assert shard.renewal().draining
    assert not shard.busy
    with pytest.raises(Draining, match="s0"):
        step(table)
    pull = table.step(jobs.begin(table.entry, "a", 0, push=False), {})
    assert torch.equal(pull.weights[0], WEIGHTS[0])


def test_a_draining_shard_finishes_the_round_that_is_under_way():
    table = opened(workers="ab")
    shard, engine = table.shards["s0"], table.engine()
    first = jobs.begin(table.entry, "a", version=0)
    shard.begin(first)
    engine.begin(first)
    shard.drain()
    assert shard.busy
    push(engine, first, GRADIENTS)
    record = step(table, "b").record
    assert record.workers == ("a", "b")
    assert talked(shard, first).record == record
    assert not shard.busy
    with pytest.raises(Draining):
        step(table, "a", 2)


# --- the exchange as a whole ---------------------------------------------------------------------


def test_a_report_that_was_lost_is_repeated_and_answered_with_the_own_one():
    table = opened(("s0", "s1"))
    table.exchange.detach("s1")
    engine = table.engine()
    begin = jobs.begin(table.entry, "a", version=0)
    engine.begin(begin)
    push(engine, begin, {0: GRADIENTS[0]})
    other = table.engine("s1")
    to_other = dataclasses.replace(begin, receiver="s1")
    table.exchange.detach("s0")
    other.begin(to_other)
    push(other, to_other, {1: GRADIENTS[1]})
    assert (engine.version, other.version) == (0, 0)
    table.exchange.attach("s1", table.shards["s1"].exchange)
    table.shards["s0"].repeat()
    assert (engine.version, other.version) == (1, 1)
    table.shards["s0"].repeat()
    assert engine.wait_decided(begin, lambda: True) == other.wait_decided(to_other, lambda: True)


def test_a_report_of_another_generation_is_refused_by_the_shard_and_survived_by_its_sender():
    table = opened(("s0", "s1"))
    later = jobs.entry(SPEC, generation=2, shards=("s0", "s1"))
    table.shards["s1"].handle(Freeze(entry=later))
    engine = table.engine()
    begin = jobs.begin(table.entry, "a", version=0)
    engine.begin(begin)
    push(engine, begin, {0: GRADIENTS[0]})
    assert engine.version == 0


@pytest.mark.parametrize("changes", [{"generation": 9}, {"slices": (), "squared_sums": ()}])
def test_an_answer_that_cannot_be_used_does_no_harm(changes, caplog):
    """It comes from a thread of the network's, which nobody would hear from again."""
    table = opened(("s0", "s1"))
    table.exchange.attach("s1", lambda request: Answer(report(table, **changes)))
    engine = table.engine()
    begin = jobs.begin(table.entry, "a", version=0)
    engine.begin(begin)
    push(engine, begin, {0: GRADIENTS[0]})
    assert engine.version == 0
    table.exchange.attach("s1", lambda request: Answer(report(table)))
    table.shards["s0"].repeat()
    assert engine.version == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"sender": "s7"},
        {"workers": ("b",)},
        {"generation": 9},
        {"slices": (0,)},
        {"squared_sums": ()},
        {"exchange": Exchange.UNSPECIFIED},
        {"partials": (Partial(slice=1, count=1, squares=b"", ratios=b"", **NOTHING),)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_report_that_is_refused_is_counted_and_the_round_ends_with_the_right_one(changes):
    table = opened(("s0", "s1"))
    table.exchange.detach("s1")
    engine = table.engine()
    begin = jobs.begin(table.entry, "a", version=0)
    engine.begin(begin)
    push(engine, begin, {0: GRADIENTS[0]})
    assert engine.holding().refused_report_count == 0
    request = ExchangeRequest(receiver="s0", report=report(table, **changes))
    with contextlib.suppress(InvalidRequest, StaleGeneration):
        table.shards["s0"].exchange(request)
    (holding,) = table.shards["s0"].renewal().holdings
    assert (holding.refused_report_count, engine.version) == (1, 0)
    table.shards["s0"].exchange(ExchangeRequest(receiver="s0", report=report(table)))
    assert (engine.holding().refused_report_count, engine.version) == (1, 1)


@dataclasses.dataclass
class Answer:
    report: Report | None


# --- what people see -----------------------------------------------------------------------------


def test_a_step_is_summed_up_once_by_every_shard_when_the_last_worker_has_its_weights():
    table = opened(("s0", "s1"), workers="ab")
    with watched(table.engine()):
        together(lambda: step(table, "a"), lambda: step(table, "b"))
    summaries = [one for one in table.told if isinstance(one, StepSummary)]
    assert len(summaries) == 2
    for summary in summaries:
        assert (summary.job, summary.step, summary.skipped) == (jobs.JOB, 1, False)
        assert set(summary.phase_s) == {"receive", "wait", "exchange", "apply", "reply"}
        assert all(phase >= 0 for phase in summary.phase_s.values())
        assert summary.duration_s > 0
        assert summary.pulled_bytes > 0
    assert sum(one.pushed_bytes for one in summaries) == 2 * 28
    assert sum(one.element_count for one in summaries) == 7
    squared = sum(one.gradient_squared_sum for one in summaries)
    assert squared == pytest.approx(sum(float(g.square().sum()) for g in GRADIENTS.values()))


def test_a_skipped_step_is_summed_up_as_such():
    table = opened()
    broken = {0: torch.full((4,), torch.nan), 1: GRADIENTS[1]}
    table.step(jobs.begin(table.entry, "a", version=0), broken)
    (summary,) = (one for one in table.told if isinstance(one, StepSummary))
    assert (summary.skipped, summary.element_count) == (True, 0)
