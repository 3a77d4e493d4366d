"""A decided step is finished in slices that nobody has at it, from the pushes of its workers."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.clusters import Node
from tests.shard.models import Case, cases
from tests.shard.tables import Reply, Table, alive, piece
from tests.shard.trainings import Push, Stream, Training, part, same, tensors

from adashard.wire.control import Freeze, Happened, Open, PlanRequest
from adashard.wire.messages import Begin, Content, Plan, Progress, Record, UploadBegin
from adashard_server.shard.records import bit, draft_record, without
from adashard_server.shard.slices import SliceStore

GENERATION = 2


def upload(table: Table, plan: Plan, shard: str, copies: dict[int, Reply], version: int) -> None:
    """Uploads to a shard the slices whose copies are of this version."""
    begin = UploadBegin(
        job=jobs.JOB,
        generation=GENERATION,
        sender="a",
        receiver=shard,
        version=version,
        state=True,
    )
    engine = table.shards[shard].upload(begin)
    taken = engine.upload(begin, alive)
    for index, reply in copies.items():
        for content, tensor in tensors(reply, index).items():
            engine.upload_piece(taken, *piece(index, tensor, content=content))


def rebuilt(
    training: Training, dead: list[str], copies: dict[int, tuple[int, Reply]], workers: str
) -> None:
    """Has fresh shards follow the dead ones, with slices from copies of either of two versions.

    Args:
        training: two steps of it have been taken.
        dead: the shards.
        copies: by slice, the version and the reply in which it came.
        workers: who is in the generation after.
    """
    table = training.table
    fresh = Table(dead, table.exchange, told=table.told)
    table.shards.update(fresh.shards)
    entry = replace(
        table.entry,
        generation=GENERATION,
        workers=jobs.entry(table.entry.spec, workers=workers).workers,
    )
    behind = tuple(sorted(index for index, (version, _) in copies.items() if version == 1))
    plan = Plan(entry=entry, base=2, record=training.records[-1], behind=behind)
    for shard in table.shards.values():
        shard.handle(Freeze(entry=entry))
        shard.handle(PlanRequest(plan=plan))
    for name in dead:
        for version in (1, 2):
            upload(
                table,
                plan,
                name,
                {
                    index: reply
                    for index, (known, reply) in copies.items()
                    if known == version and table.owner(index) == name
                },
                version,
            )
    for shard in table.shards.values():
        assert shard.handle(PlanRequest(plan=plan)) is not None
        shard.handle(Open(plan=plan))
    table.entry = entry


def disturbed(case: Case, seed: int) -> tuple[Training, list[str], dict[int, tuple[int, Reply]]]:
    """A job two steps on, some of whose shards have died, and what workers hold of their slices."""
    rng = random.Random(seed)
    training = case.spread()
    first, second = (training.step(case.steps[n], case.chooser)[0] for n in (0, 1))
    dead = [name for name in training.table.shards if rng.random() < 0.6]
    lost = [n for n in range(len(training.slices)) if training.table.owner(n) in dead]
    copies = {n: rng.choice([(1, first), (2, second)]) for n in lost}
    if len(lost) == len(training.slices):  # somebody has heard of the step, or it is not decided
        copies[rng.choice(lost)] = 2, second
    return training, dead, copies


@given(cases(), st.integers(0, 10_000))
def test_slices_rebuilt_at_the_version_before_take_the_step_with_the_bits_of_others(case, seed):
    undisturbed = case.alone()
    training, dead, copies = disturbed(case, seed)
    rebuilt(training, dead, copies, "abcd"[: len(case.steps[0])])
    training.step_number = 1
    expected = [undisturbed.step(pushes)[0] for pushes in case.steps]
    for reply in training.step(case.steps[1], case.chooser):
        assert same(reply, expected[1])
    for reply in training.step(case.steps[2], case.chooser):
        assert same(reply, expected[2])
    assert not [one for one in training.table.told if isinstance(one, Happened)]


def without_the_first(training: Training, case: Case, index: int, before: Reply) -> SliceStore:
    """A slice that takes the second step by itself, from the gradients of all workers but one.

    Where none of them has a gradient for it, only its version moves.
    """
    record = without(training.records[1], ["a"])
    store = SliceStore(case.job, training.slices, torch.device("cpu"))
    store.put(index, {content: one.clone() for content, one in tensors(before, index).items()})
    one, first = training.slices[index], True
    for push in case.steps[1][1:]:
        if one.parameter in push.gradients:
            addend = part(one, push.gradients[one.parameter]).reshape(-1)
            store.add(index, 0, 0, addend, share=push.share, first=first)
            first = False
    if not first:
        store.apply(index, record)
    return store


@given(cases(), st.integers(0, 10_000))
def test_where_a_worker_died_too_the_others_finish_and_it_is_said_of_which_slices(case, seed):
    training, dead, copies = disturbed(case, seed)
    missed = {
        index
        for index, (version, _) in copies.items()
        if version == 1 and bit(training.records[1].present, training.slices[index].parameter)
    }
    expected = {n: without_the_first(training, case, n, copies[n][1]) for n in missed}
    untouched = training.records[-1]
    left = "abcd"[1 : len(case.steps[1])]
    rebuilt(training, dead, copies, left + "e")
    for name in training.table.shards:
        for rank, worker in enumerate(left, start=1):
            push_again(training, case, name, worker, case.steps[1][rank])
    pull = jobs.begin(training.table.entry, "e", 2, push=False, state=True)
    reply = training.table.step(pull, {})
    assert reply.record == untouched
    for index, store in expected.items():
        assert torch.equal(reply.weights[index], store.tensor(index, Content.WEIGHT))
        for content, tensor in reply.states[index].items():
            assert torch.equal(tensor, store.tensor(index, content))
    said = [one.facts for one in training.table.told if isinstance(one, Happened)]
    assert {int(n) for facts in said for n in facts["slices"].split(",")} == missed
    assert all((facts["step"], facts["workers"]) == ("2", "a") for facts in said)


def push_again(training: Training, case: Case, shard: str, worker: str, push: Push) -> None:
    """A worker that has kept its gradient of the second step sends it to a shard once more."""
    training.step_number = 2
    stream = Stream(training, "abcd".index(worker), push, shard, case.chooser)
    while not stream.done:
        stream.act()


# --- two changes in a row ------------------------------------------------------------------------


def behind_again(workers: str, generation: int, record: Record) -> Plan:
    entry = jobs.entry(jobs.spec((6,)), generation=generation, workers=workers)
    return Plan(entry=entry, base=1, record=record, behind=(0,))


def test_what_a_worker_had_pushed_of_its_part_is_not_in_the_sum_when_it_is_finished_without_it():
    """It died in the repair, with half of its gradient in the sum of a slice that was rebuilt."""
    record = draft_record(1, [begin_of(worker, 1) for worker in "abc"], (0,))
    node = Node("s0")
    open_behind(node, behind_again("abc", 1, record))
    node.push_all(begin_of("a", 1))
    node.begin(begin_of("b", 1))
    assert node.push(begin_of("b", 1), 0, 0, 3)
    open_behind(node, behind_again("ac", 2, record))
    assert node.rounds.record_for(0).workers == ("a", "c")
    for worker in "ac":
        assert not node.rounds.can_pay(0)
        node.push_all(begin_of(worker, 2))
    assert node.sums[0] == [["a", "c"]] * 6
    assert node.rounds.can_pay(0)


def test_a_broken_push_is_told_where_to_go_on_after_another_change():
    record = draft_record(1, [begin_of(worker, 1) for worker in "ab"], (0,))
    node = Node("s0")
    open_behind(node, behind_again("ab", 1, record))
    node.begin(begin_of("a", 1))
    assert node.push(begin_of("a", 1), 0, 0, 3)
    open_behind(node, behind_again("ab", 2, record))
    acknowledge, _ = node.rounds.begin(begin_of("a", 2))
    assert acknowledge.progress == (Progress(slice=0, count=3),)
    assert not acknowledge.complete


def begin_of(worker: str, generation: int) -> Begin:
    return jobs.begin(jobs.entry(jobs.spec((6,)), generation=generation, workers="abc"), worker)


def open_behind(node: Node, plan: Plan) -> None:
    """A change of generation in which the slice, if it is not here, comes at the version before."""
    node.rounds.freeze(plan.entry)
    node.rounds.plan(plan)
    if node.rounds.lacks(0, 0):
        node.rounds.uploaded(0, 0)
    assert node.rounds.planned
    node.carry_out(node.rounds.open(plan))
