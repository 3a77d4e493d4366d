"""Uploads of whole slices: weights, and state with them, in any order; nothing is torn."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.models import cases
from tests.shard.tables import Table, alive, piece
from tests.shard.trainings import same

from adashard.wire.errors import DamagedFrame, InvalidFrame, StaleGeneration
from adashard.wire.messages import Content, Run, UploadBegin
from adashard.wire.placement import cut
from adashard.wire.spec import DType
from adashard_server.shard.slices import SliceStore
from adashard_server.shard.uploads import Upload

# A matrix cut along its columns, with state of three kinds.
JOB = jobs.spec((2, 20), slice_bytes=100, momentum=True)
SHAPES = {
    Content.WEIGHT: (2, 10),
    Content.ROW: (2,),
    Content.COLUMN: (10,),
    Content.MOMENTUM: (2, 10),
}


def begun(*, state: bool = True) -> Upload:
    """An upload to a shard that holds nothing yet."""
    store = SliceStore(JOB, cut(JOB), torch.device("cpu"))
    begin = UploadBegin(
        job=jobs.JOB, generation=1, sender="a", receiver="s0", version=0, state=state
    )
    return Upload(begin, store.shapes, torch.device("cpu"))


def numbers(content: Content) -> torch.Tensor:
    return 100.0 * content + torch.arange(torch.Size(SHAPES[content]).numel())


def runs_of(contents, borders=()) -> list[tuple[Run, memoryview]]:
    """A slice's tensors, one after the other, each cut at these borders."""
    found = []
    for content in contents:
        count = numbers(content).numel()
        cuts = sorted({0, count, *(border for border in borders if border < count)})
        for start, stop in itertools.pairwise(cuts):
            found.append(piece(0, numbers(content), start, stop, content))
    return found


@given(st.permutations(list(SHAPES)), st.lists(st.integers(1, 19)), st.randoms())
def test_the_tensors_of_a_slice_may_come_in_any_order(order, borders, chooser):
    """Also mixed, as long as each comes from its first to its last element."""
    upload = begun()
    waiting = {content: runs_of([content], borders) for content in order}
    whole = None
    while waiting:
        assert whole is None
        content = chooser.choice(list(waiting))
        whole = upload.take(*waiting[content].pop(0))
        if not waiting[content]:
            del waiting[content]
    assert whole is not None
    assert {content: one.tolist() for content, one in whole.items()} == {
        content: numbers(content).tolist() for content in SHAPES
    }
    assert upload.slice_count == 1


@pytest.mark.parametrize("missing", SHAPES)
def test_a_slice_of_which_something_is_missing_is_not_whole(missing):
    upload = begun()
    others = [content for content in SHAPES if content is not missing]
    assert [upload.take(*run) for run in runs_of(others)] == [None] * 3
    assert upload.take(*piece(0, numbers(missing), 0, 1, missing)) is None


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("content", [Content.VECTOR, Content.ROW, Content.UNSPECIFIED])
def test_what_a_slice_does_not_consist_of_is_refused(content, state):
    if state and content is Content.ROW:
        return
    run = Run(slice=0, start=0, count=1, dtype=DType.FLOAT32, content=content)
    with pytest.raises(InvalidFrame, match="has no"):
        begun(state=state).take(run, memoryview(bytes(4)))


def test_without_state_the_weights_alone_are_whole():
    whole = begun(state=False).take(*piece(0, numbers(Content.WEIGHT)))
    assert list(whole) == [Content.WEIGHT]


@pytest.mark.parametrize("content", SHAPES)
def test_what_comes_twice_is_refused(content):
    upload = begun()
    (run,) = runs_of([content])
    upload.take(*run)
    with pytest.raises(InvalidFrame, match="goes on at element"):
        upload.take(*run)


@pytest.mark.parametrize("begin_with", [[], [Content.WEIGHT], list(SHAPES)])
def test_a_run_without_elements_is_refused(begin_with):
    """After the last element it would make the slice whole once more, of nothing."""
    upload = begun()
    for run in runs_of(begin_with):
        upload.take(*run)
    came = 20 if begin_with else 0
    with pytest.raises(InvalidFrame):
        upload.take(Run(slice=0, start=came, count=0, dtype=DType.FLOAT32), memoryview(b""))


@given(st.sampled_from(list(SHAPES)), st.integers(1, 19), st.integers(0, 79), st.integers(1, 255))
def test_bytes_that_are_not_those_that_were_sent_are_refused(content, border, place, flip):
    upload, runs = begun(), runs_of([content], [border])
    where = place % sum(buffer.nbytes for _, buffer in runs)
    for run, buffer in runs:
        damaged = bytearray(buffer)
        if where < len(damaged):
            damaged[where] ^= flip
            break
        where -= len(damaged)
        upload.take(run, buffer)
    with pytest.raises(DamagedFrame, match=f"of slice 0 came damaged from {upload.begin.sender}"):
        upload.take(run, memoryview(damaged))


def test_narrow_weights_are_widened():
    narrow = numbers(Content.WEIGHT).bfloat16()
    whole = begun(state=False).take(*piece(0, narrow))
    assert whole[Content.WEIGHT].dtype is torch.float32
    assert torch.equal(whole[Content.WEIGHT], narrow.float())


def test_an_upload_that_breaks_off_tears_nothing():
    table = Table()
    plan = jobs.plan(jobs.entry(JOB))
    weights = {index: numbers(Content.WEIGHT) for index in (0, 1)}
    table.freeze(plan.entry)
    table.plan(plan)
    engine = table.engine()
    begin = UploadBegin(
        job=jobs.JOB, generation=1, sender="a", receiver="s0", version=0, state=True
    )
    upload = engine.upload(begin, alive)
    for run in runs_of([Content.WEIGHT, Content.ROW, Content.COLUMN]):
        assert not engine.upload_piece(upload, *run)
    assert engine.holding().weight_bytes == 0
    table.open(plan, weights)
    with pytest.raises(StaleGeneration):
        engine.upload_piece(upload, *runs_of([Content.MOMENTUM])[0])
    pull = jobs.begin(plan.entry, "a", 0, push=False, state=True)
    reply = table.step(pull, {})
    assert all(torch.equal(reply.weights[index], weights[index]) for index in weights)
    assert not any(one.any() for state in reply.states.values() for one in state.values())


@given(cases())
def test_a_training_goes_on_from_uploaded_weights_and_state_with_the_same_bits(case):
    """On other shards, which have nothing but what a reply with state has brought."""
    first, ran_through = case.alone(), case.alone()
    for pushes in case.steps[:2]:
        (reply, *_) = first.step(pushes)
        ran_through.step(pushes)
    (expected, *_) = ran_through.step(case.steps[2])
    resumed = case.spread()
    entry = dataclasses.replace(
        resumed.table.entry,
        generation=2,
        lineage=dataclasses.replace(resumed.table.entry.lineage, number=2),
    )
    plan = jobs.plan(entry, base=2, record=first.records[-1])
    resumed.table.open(plan, reply.weights, reply.states)
    resumed.step_number = 2
    for again in resumed.step(case.steps[2], case.chooser):
        assert same(again, expected)
    assert resumed.records[-1] == ran_through.records[-1]


@given(cases())
def test_the_sum_of_squared_weights_that_a_step_leaves_is_that_of_the_same_weights_put(case):
    """Bit for bit, so that a slice that is copied steps like the one that it is a copy of."""
    training = case.alone()
    for pushes in case.steps:
        (reply, *_) = training.step(pushes)
    store = training.table.engine("s0")._store
    kept = {index: held.squared_sum for index, held in store._held.items()}
    for index, weight in reply.weights.items():
        store.put(index, {Content.WEIGHT: weight})
    assert {index: held.squared_sum for index, held in store._held.items()} == kept
