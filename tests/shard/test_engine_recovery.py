"""A shard that was frozen with full sums takes the step with the record that the plan brings."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.models import Case, cases
from tests.shard.tables import Reply
from tests.shard.trainings import Training, same

from adashard.wire.messages import Content, Exchange, Record
from adashard.wire.placement import cut
from adashard_server.shard.exchange import MemoryExchange
from adashard_server.shard.records import draft_record
from adashard_server.shard.slices import SliceStore


def cut_off(training: Training) -> None:
    """No report reaches any shard from here on."""
    assert isinstance(training.table.exchange, MemoryExchange)
    for name in training.table.shards:
        training.table.exchange.detach(name)


def taken(training: Training, record: Record) -> Reply:
    """What all slices are after a change of generation that begins with this record."""
    entry = dataclasses.replace(training.table.entry, generation=2)
    training.table.open(jobs.plan(entry, base=record.step, record=record))
    return training.table.step(jobs.begin(entry, "a", record.step, push=False, state=True), {})


def measure(training: Training, draft: Record) -> None:
    """Every slice with a gradient is measured for this draft."""
    for name in training.table.shards:
        store = training.table.engine(name)._store
        for index in store._sums:
            store.measure(index, Exchange.PARTIALS, draft)


def step_before(case: Case) -> tuple[Training, Reply, Record]:
    """Shards with full sums that have heard of no report, and what their peers have made of it."""
    alone, frozen = case.alone(), case.spread()
    alone.step(case.steps[0])
    frozen.step(case.steps[0], case.chooser)
    (expected, *_) = alone.step(case.steps[1])
    cut_off(frozen)
    frozen.fill(case.steps[1], case.chooser)
    return frozen, expected, alone.records[-1]


@given(cases())
def test_it_takes_the_step_with_the_bits_of_its_peers_whatever_it_has_measured(case):
    """For the norm alone, where that comes first, or its partials, but for no record."""
    frozen, expected, record = step_before(case)
    assert same(taken(frozen, record), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_factor": 0.25},
        {"shares": (0.001,)},
        {"groups": (jobs.group_step(range(1, 5), eps1=0.125),) * 2},
    ],
    ids=lambda change: next(iter(change)),
)
@settings(max_examples=10)
@given(data=st.data())
def test_what_was_measured_for_another_draft_is_measured_again(change, data):
    case = data.draw(cases())
    frozen, expected, record = step_before(case)
    groups = change.get("groups", record.groups)[: len(record.groups)]
    measure(frozen, dataclasses.replace(record, **{**change, "groups": groups}))
    assert same(taken(frozen, record), expected)


def test_what_was_measured_of_a_slice_that_is_put_anew_is_not_believed():
    job = jobs.spec((4, 3))
    step = jobs.group_step([1])
    half = dataclasses.replace(step.schedules[0], beta2=0.5)
    groups = (dataclasses.replace(step, schedules=(half,)),)
    draft = draft_record(1, [jobs.begin(jobs.entry(job), "a", groups=groups)], (0,))
    fresh, used = (SliceStore(job, cut(job), torch.device("cpu")) for _ in range(2))
    for store in (used, fresh):
        store.put(0, {Content.WEIGHT: torch.ones(12)})
        store.add(0, 0, 0, torch.arange(12.0), share=1.0, first=True)
    used.measure(0, Exchange.PARTIALS, draft)
    for store in (used, fresh):
        state = {Content.ROW: torch.arange(1.0, 5.0), Content.COLUMN: torch.arange(1.0, 4.0)}
        store.put(0, {Content.WEIGHT: torch.ones(12), **state})
    for store in (used, fresh):
        store.apply(0, draft)
    for content in (Content.WEIGHT, Content.ROW, Content.COLUMN):
        assert torch.equal(used.tensor(0, content), fresh.tensor(0, content))


@given(cases())
def test_a_shard_that_hears_of_the_commit_late_steps_on_with_the_others(case):
    """The generation after goes on from the recovered slices as if nothing had happened."""
    frozen, _, record = step_before(case)
    taken(frozen, record)
    undisturbed = case.alone()
    for pushes in case.steps:
        (expected, *_) = undisturbed.step(pushes)
    for name, shard in frozen.table.shards.items():
        frozen.table.exchange.attach(name, shard.exchange)
    for reply in frozen.step(case.steps[2], case.chooser):
        assert same(reply, expected)
    assert frozen.records[-1] == undisturbed.records[-1]
