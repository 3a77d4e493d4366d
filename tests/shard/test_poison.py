"""Gradients that are not finite, on shards: what workers say of theirs, and what is found."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.shard import jobs, scenes
from tests.shard.clusters import Cluster
from tests.shard.models import cases
from tests.shard.pushers import SPEC, dice, entries, opened
from tests.shard.tables import Reply, together, watched
from tests.shard.trainings import Push, same

from adashard.wire.control import StepSummary
from adashard.wire.errors import InvalidRequest
from adashard.wire.messages import Outcome
from adashard.wire.spec import Parameter
from adashard_server.shard.records import CLEAN, NAMED_MAX, Poison, poison

# --- what a worker says --------------------------------------------------------------------------


@given(entries(), dice)
def test_a_worker_that_says_so_has_all_shards_skip_as_soon_as_all_pushes_have_begun(entry, chooser):
    """No sum is waited for, none is measured, and nothing is exchanged."""
    cluster = Cluster(entry)
    beginnings = [
        (node, jobs.begin(entry, worker, receiver=name, **said))
        for name, node in cluster.nodes.items()
        for worker, said in (("a", {}), ("b", {"present": [], "not_finite": (1, 3)}))
    ]
    chooser.shuffle(beginnings)
    for node, begin in beginnings:
        assert node.records == []
        node.begin(begin)
    for node in cluster.nodes.values():
        assert (node.sent, node.measured) == ([], [])
        assert node.records == cluster.nodes["s" + entry.shards[0].id[1:]].records
        (record,) = node.records
        assert (record.outcome, record.step_counts) == (Outcome.SKIP, (0,) * 5)
        (committed,) = node.committed
        assert committed.poison == Poison(("b",), ("p1", "p3"))
        assert math.isnan(committed.squared_sum)
        node.settle()
        assert node.rounds.version == 1
    cluster.push_all(2)
    cluster.deliver_all()
    assert all(node.records[-1].outcome is Outcome.APPLY for node in cluster.nodes.values())


@given(cases(), st.integers(0, 2))
@settings(max_examples=15)
def test_a_step_that_a_worker_says_is_not_finite_leaves_nothing_behind(case, at):
    """Whatever frames of the others had come: the steps after are as if it had not been."""
    said = [Push({}, options={"not_finite": (0,)}), *case.steps[at][1:]]
    case.steps.insert(at, said)
    undisturbed, spread = case.alone(), case.spread()
    for number, pushes in enumerate(case.steps):
        replies = spread.step(pushes, case.chooser)
        if number == at:
            assert spread.records[-1].outcome is Outcome.SKIP
            continue
        (expected, *_) = undisturbed.step(pushes)
        assert all(same(reply, expected) for reply in replies)
    told = [one for one in spread.table.told if isinstance(one, StepSummary)]
    of_the_step = [one for one in told if one.step == at + 1]
    assert [one.not_finite_workers for one in of_the_step] == [("a",)] * len(spread.table.shards)
    assert {one.not_finite_parameters for one in of_the_step} == {("p0",)}
    assert all(one.skipped == (one.step == at + 1) for one in told)


def test_a_push_that_waits_for_its_turn_is_let_go_and_nothing_of_it_stays():
    table = scenes.opened(workers="ab", early_bytes_max=0)
    pushed = jobs.begin(table.entry, "b", version=0)
    said = jobs.begin(table.entry, "a", present=[], not_finite=(0,), version=0)
    with watched(table.engine()) as waits:

        def say_so() -> Reply:
            waits.one()
            return table.step(said, {})

        replies = together(lambda: table.step(pushed, scenes.values(2)), say_so)
    for reply in replies:
        assert (sorted(reply.unchanged), reply.weights) == ([0, 1, 2], {})
    gradients = {"a": scenes.values(3), "b": scenes.values(4)}
    begins = {name: jobs.begin(table.entry, name, 2, version=1) for name in gradients}
    replies = together(
        *(lambda name=name: table.step(begins[name], gradients[name]) for name in "ab")
    )
    mean = scenes.in_rank_order(*gradients.values(), shares=(1.0, 1.0))
    assert all(scenes.equal(reply.weights, scenes.alone(mean)) for reply in replies)


def test_a_shard_that_had_not_heard_of_it_skips_by_the_record_with_whatever_sums_it_has():
    """The others have committed, and the worker that said so is gone."""
    entry = jobs.entry(SPEC, workers="ab", shards=("s0", "s1"), placement=(0, 1, 0))
    first, second = Cluster(entry).nodes.values()
    for begin in (
        jobs.begin(entry, "a"),
        jobs.begin(entry, "b", present=[], not_finite=(0,)),
    ):
        first.begin(begin)
    (record,) = first.records
    begin = jobs.begin(entry, "a", receiver="s1")
    second.begin(begin)
    second.push(begin, 1, 0, 3)
    without_b = jobs.entry(
        SPEC, generation=2, workers="a", shards=("s0", "s1"), placement=(0, 1, 0)
    )
    second.rounds.freeze(without_b)
    second.rounds.plan(jobs.plan(without_b, 1, record))
    assert second.rounds.payable == [1]
    second.settle()
    assert (second.rounds.planned, second.rounds.versions) == (True, {1: 1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"not_finite": (3,)}, "parameters below 3"),
        ({"not_finite": (-1,)}, "parameters below 3"),
        ({"not_finite": (1, 0)}, "ascending"),
        ({"not_finite": (1, 1)}, "once each"),
        ({"not_finite": (0,), "present": [1]}, "sends none"),
    ],
)
def test_what_a_worker_cannot_say_is_refused(changes, words):
    node = opened()
    begin = jobs.begin(node.rounds.entry, "a", **{"present": [], **changes})
    with pytest.raises(InvalidRequest, match=words):
        node.rounds.begin(begin)
    assert node.records == []


def test_a_worker_cannot_take_back_what_it_has_said():
    node = opened(workers="ab")
    begin = jobs.begin(node.rounds.entry, "a", present=[], not_finite=(0,))
    node.begin(begin)
    with pytest.raises(InvalidRequest, match="another gradient for step 1"):
        node.begin(dataclasses.replace(begin, not_finite=()))


# --- what a shard finds --------------------------------------------------------------------------


def test_parameters_are_named_of_which_a_slice_is_found_to_be_broken():
    entry = jobs.entry(SPEC, shards=("s0", "s1"), placement=(0, 1, 0))
    cluster = Cluster(entry)
    for node in cluster.nodes.values():
        node.square = lambda index: math.inf if index == 2 else 1.0
    cluster.push_all()
    cluster.deliver_all()
    first, second = (node.committed[0].poison for node in cluster.nodes.values())
    assert (first, second) == (Poison((), ("p2",)), CLEAN)


def test_a_step_without_any_is_clean():
    node = opened()
    node.push_all(jobs.begin(node.rounds.entry, "a"))
    assert node.committed[0].poison == CLEAN


@given(st.lists(st.sets(st.integers(0, 40)), max_size=4), st.sets(st.integers(0, 40)))
def test_all_workers_and_the_first_few_parameters_are_named(said, found):
    entry = jobs.entry(SPEC)
    begins = [
        jobs.begin(entry, "abcd"[rank], present=[], not_finite=tuple(sorted(named)))
        for rank, named in enumerate(said)
    ]
    parameters = [Parameter(name=f"p{index}", shape=()) for index in range(41)]
    named = poison(begins, found, parameters)
    assert named.workers == tuple("abcd"[rank] for rank, one in enumerate(said) if one)
    every = sorted(found.union(*said))
    assert named.parameters == tuple(f"p{index}" for index in every)[:NAMED_MAX]
