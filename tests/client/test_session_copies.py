"""A session as a holder: what it keeps of a step, gives back, and pushes once more."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from tests.client.fakes import WAIT_S, honest, read, record
from tests.client.stage import SPEC
from tests.shard import jobs
from tests.shard.tables import piece

from adashard.push import Replies
from adashard.wire.control import Frozen, Happened, Hello, Open, Opened, PlanRequest
from adashard.wire.errors import LeaseExpired, ShardUnavailable, StaleGeneration
from adashard.wire.frames import data_frame, leading_frame, read_frame
from adashard.wire.messages import Acknowledge, Plan, Progress, Source
from adashard.wire.spec import Recovery

pytestmark = pytest.mark.usefixtures("no_waits")


def named(play, plan: Plan, *wanted: tuple[int, int]) -> Plan:
    """The plan, with these slices and versions wanted of the worker."""
    sources = [Source(slice=i, member=play.session.id, version=v) for i, v in wanted]
    return replace(plan, sources=tuple(sources))


def uploaded(play, plan: Plan, count: int) -> list:
    """Asks for copies until this many uploads have come."""
    uploads = [one for shard in play.shards for one in shard.uploads]
    while len(uploads) < count:
        play.control.say(PlanRequest(plan=plan))
        play.freeze(plan.entry.generation)  # a round trip
        uploads = [one for shard in play.shards for one in shard.uploads]
    return uploads


def half_a_step(play, goes_on: Plan | None = None) -> list[Frozen]:
    """One of two slices comes with the next step, then the generation ends; the answer to that."""
    answers: list[Frozen] = []

    def cut_off(shard, begin, frames):
        answer = honest(shard, begin, frames)
        for _ in range(4):  # acknowledge, record, weights and state of slice 0
            yield next(answer)
        answers.append(play.freeze(2))
        if goes_on is not None:
            play.control.say(Open(plan=goes_on))
        raise ShardUnavailable("killed")

    play.shards[0].script = [cut_off]
    return answers


def ours(play, step: int = 1):
    """The record of a step that this worker took part in."""
    return replace(record(step, step), workers=(play.session.id,))


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("recovery", [Recovery.WORKERS, Recovery.CHECKPOINT])
def test_state_comes_with_every_reply_where_workers_are_to_give_it_back(stage, recovery):
    play = stage()
    entry = replace(play.entry(origin="other"), spec=replace(SPEC, recovery=recovery))
    play.freeze_with(entry)
    play.control.say(Open(plan=jobs.plan(entry)))
    assert play.step()
    assert [begin.push for begin in play.shards[0].begins] == [False, True]
    with_state = recovery is Recovery.WORKERS
    assert {begin.state for begin in play.shards[0].begins} == {with_state}
    frozen = play.freeze_with(replace(entry, generation=2))
    assert frozen.slices == ((0, 1) if with_state else ())


def test_a_freeze_in_the_middle_of_a_step_is_answered_with_what_came_whole(stage):
    play = stage()
    play.open()
    answers = half_a_step(play, jobs.plan(play.entry(2), 1, record(1)))
    assert play.step()
    (frozen,) = answers
    assert (frozen.slices, frozen.versions, frozen.record) == ((0, 1), (1, 0), record(1, 1))
    assert (play.values, play.session.version) == ([-1.0, -1.0], 1)
    begin = play.shards[0].begins[-1]
    assert (begin.slices, begin.push) == ((1,), False), "what came whole is not asked for"


def test_a_reply_that_comes_damaged_is_asked_for_again_and_nothing_of_it_is_used(stage):
    play = stage()
    play.open()
    seen = []

    def damaged(shard, begin, frames):
        whole = list(honest(shard, begin, frames))
        yield from whole[:2]
        run, part = piece(0, torch.full((4,), 7.0))
        yield data_frame([replace(run, checksum=run.checksum ^ 1)], [part])

    def again(shard, begin, frames):
        seen.extend(play.values)
        yield from honest(shard, begin, frames)

    play.shards[0].script = [damaged, again]
    assert play.step()
    assert seen == [0.0, 0.0]
    assert play.values == [-1.0, -1.0]


# --- what is given back --------------------------------------------------------------------------


def test_slices_of_two_versions_are_uploaded_each_with_its_own_and_with_its_state(stage):
    play = stage()
    play.open()
    play.step()
    answers = half_a_step(play)

    def until_the_end():
        with pytest.raises(LeaseExpired):
            play.step()

    threading.Thread(target=until_the_end, daemon=True).start()
    while not answers:
        pass  # the step waits for the next generation; the test's own timeout is the limit
    plan = named(play, jobs.plan(play.entry(2), 2, record(2)), (0, 2), (1, 1))
    uploads = uploaded(play, plan, 2)
    assert {(begin.version, *slices) for begin, slices in uploads} == {(2, 0), (1, 1)}
    weights = {index: one.tolist() for _, slices in uploads for index, one in slices.items()}
    assert weights == {0: [-2.0] * 4, 1: [-1.0] * 3}
    capsules = {index: one.tolist() for index, one in play.shards[0].capsules.items()}
    assert capsules == {0: [2.0] * 4, 1: [1.0] * 3}


def test_what_a_shard_has_acknowledged_is_not_sent_again(stage):
    play = stage()
    plan = jobs.plan(play.entry(), sources=True)
    play.freeze()
    uploaded(play, plan, 1)
    for _ in range(3):
        play.control.say(PlanRequest(plan=plan))
        play.freeze()
    play.control.say(Open(plan=plan))
    play.transport.hear(Opened)
    play.step()
    assert len(play.shards[0].uploads) == 1
    later = named(play, jobs.plan(play.entry(2), 1, record(1)), (0, 1))
    play.freeze(2)
    assert len(uploaded(play, later, 2)) == 2, "another plan asks anew"


def test_an_upload_that_hangs_does_not_keep_the_next_plan_s(stage):
    play = stage()
    play.freeze()
    hanging = play.transport.upload
    begun, released = threading.Event(), threading.Event()

    def hangs(address, frames):
        begun.set()
        assert released.wait(WAIT_S)
        raise ShardUnavailable("gone")

    play.transport.upload = hangs
    play.control.say(PlanRequest(plan=jobs.plan(play.entry(), sources=True)))
    assert begun.wait(WAIT_S)
    play.transport.upload = hanging
    play.freeze(2)
    assert uploaded(play, jobs.plan(play.entry(2), sources=True), 1)
    released.set()


def test_weights_that_user_code_has_changed_are_not_given_away_and_that_is_said(stage, caplog):
    play = stage()
    play.open()
    play.step()
    play.parameters[1][1] = 0.25  # an average, say, or a file
    assert play.freeze(2).slices == (0, 1)
    plan = named(play, jobs.plan(play.entry(2), 1, record(1)), (0, 1), (1, 1))
    play.control.say(PlanRequest(plan=plan))
    happened = play.transport.hear(Happened)
    assert (happened.name, happened.facts["slices"]) == ("changed", "1")
    assert "'p1'" in happened.text
    assert happened.text in caplog.text
    again = play.transport.hear(Frozen)
    assert (again.generation, again.slices, again.versions) == (2, (0,), (1,))
    ((_, slices),) = uploaded(play, plan, 1)
    assert list(slices) == [0]
    play.control.say(PlanRequest(plan=plan))
    assert play.transport.hear(Frozen) == again, "until there is another plan"


@pytest.mark.parametrize("keep_masters", [False, True])
def test_copies_that_were_rounded_are_told_of_once_in_a_generation(stage, keep_masters):
    replies = Replies(dtype=torch.bfloat16, keep_masters=keep_masters)
    play = stage(weights=1 + 2**-10, replies=replies)
    play.open(origin="other")
    play.step()
    play.step()
    assert play.values == [torch.tensor(2**-10).bfloat16().float()] * 2
    for generation in (2, 3):
        play.freeze(generation, origin="other")
        entry = play.entry(generation, origin="other")
        plan = named(play, jobs.plan(entry, 1, record(1)), (0, 1))
        play.control.say(PlanRequest(plan=plan))
        if not keep_masters:
            happened = play.transport.hear(Happened)
            assert (happened.name, happened.facts["slices"]) == ("rounded", "1")
            assert happened.facts["generation"] == str(generation)


# --- what is pushed once more --------------------------------------------------------------------


@pytest.mark.parametrize("taken", [True, False])
def test_a_decided_step_is_finished_with_the_same_gradient_where_nobody_has_a_slice(stage, taken):
    """Slice 0 came, its shard and slice 1 with it are gone: they are taken from pushes."""
    play = stage()
    play.open()
    gradients = {}
    of = ours(play) if taken else record(1)
    half_a_step(play, replace(jobs.plan(play.entry(2), 1, of), behind=(1,)))

    def collects(shard, begin, frames):
        assert (begin.step, begin.push, begin.slices) == (1, taken, (1,))
        yield leading_frame(Acknowledge(version=0))
        gradients.update(read(frames))
        shard.record = of
        yield from shard.reply(begin)

    play.shards[0].script.append(collects)
    assert play.step()
    assert {index: one.tolist() for index, one in gradients.items()} == (
        {1: [1.0] * 3} if taken else {}
    )
    assert (play.values, play.session.version) == ([-1.0, -1.0], 1)
    assert set(play.counts) == {(0, 0)}, "the settings are those of the first push"


@pytest.mark.parametrize("there", [0, 2, 4])
def test_a_repeated_push_goes_on_where_the_shard_says(stage, there):
    play = stage()
    play.open()
    sent = []

    def breaks_off(shard, begin, frames):
        yield leading_frame(Acknowledge(version=0))
        next(frames)
        raise ShardUnavailable("broken")

    def has_some(shard, begin, frames):
        progress = (Progress(slice=0, count=there),) if there else ()
        yield leading_frame(Acknowledge(version=0, progress=progress))
        frames = list(frames)
        sent.extend(run for frame in frames for run in read_frame(frame).runs)
        shard.take(begin, {0: torch.ones(4), 1: torch.ones(3)})
        yield from shard.reply(begin)

    play.shards[0].script = [breaks_off, has_some]
    assert play.step()
    expected = [(0, there, 4 - there), (1, 0, 3)]
    assert [(run.slice, run.start, run.count) for run in sent] == expected[there == 4 :]


def test_a_push_that_goes_on_in_the_next_generation_first_hears_what_is_there(stage):
    play = stage()
    play.open()
    sent = []

    def freezes(shard, begin, frames):
        yield leading_frame(Acknowledge(version=0))
        next(frames)
        play.freeze(2)
        play.control.say(Open(plan=jobs.plan(play.entry(2))))
        raise StaleGeneration("frozen")

    def has_all(shard, begin, frames):
        yield leading_frame(Acknowledge(version=0, progress=(Progress(slice=0, count=4),)))
        sent.extend(read(frames))
        shard.take(begin, {0: torch.ones(4), 1: torch.ones(3)})
        yield from shard.reply(begin)

    play.shards[0].script = [freezes, has_all]
    assert play.step()
    assert sent == [1]


def test_a_gradient_of_weights_that_a_restore_has_replaced_is_dropped(stage):
    play = stage()
    play.open()
    play.step()
    restored = play.entry(2, lineage=2, origin="checkpoint")

    def restores(shard, begin, frames):
        yield leading_frame(Acknowledge(version=1))
        shard.weights = {0: torch.full((4,), 9.0), 1: torch.full((3,), 9.0)}
        shard.version, shard.record = 0, None
        play.freeze_with(restored)
        play.control.say(Open(plan=jobs.plan(restored)))
        raise StaleGeneration("frozen")

    play.shards[0].script = [restores]
    assert play.step() is False
    assert (play.values, play.session.version) == ([9.0, 9.0], 0)
    assert play.step() is True
    assert play.values == [8.0, 8.0]


# --- a coordinator that knows nothing ------------------------------------------------------------


def test_a_new_coordinator_is_told_of_the_newest_generation(stage):
    play = stage()
    first = play.transport.hear(Hello)
    assert first.entries == ()
    play.open(3)
    play.control.say(ShardUnavailable("the coordinator is gone"))
    assert play.transport.hear(Hello).entries == (play.entry(3),)
