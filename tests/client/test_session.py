"""A session: joining, and steps."""

from __future__ import annotations

import threading

import pytest
from tests.client.fakes import WAIT_S, honest, read, record
from tests.client.stage import SPEC
from tests.shard import jobs
from tests.shard.tables import piece

from adashard.push import Push
from adashard.wire.control import (
    Bye,
    Hello,
    Logged,
    Notice,
    OnExisting,
    Open,
    Opened,
    PlanRequest,
    Renewal,
    Welcome,
)
from adashard.wire.errors import (
    Internal,
    InvalidFrame,
    InvalidRequest,
    JobExists,
    ModelMismatch,
    ShardUnavailable,
)
from adashard.wire.frames import data_frame, leading_frame
from adashard.wire.messages import Acknowledge

pytestmark = pytest.mark.usefixtures("no_waits")


# --- joining -------------------------------------------------------------------------------------


def test_the_origin_uploads_its_weights_to_where_they_are_placed(stage):
    play = stage(shards=2)
    play.parameters[0].fill_(5.0)
    plan = jobs.plan(play.entry(), sources=True)
    play.freeze()
    play.control.say(PlanRequest(plan=plan))
    while not all(shard.uploads for shard in play.shards):
        pass  # a thread of its own uploads; the test's own timeout is the limit
    play.control.say(Open(plan=plan))
    play.transport.hear(Opened)
    play.step()
    for index, shard in enumerate(play.shards):
        ((begin, slices),) = shard.uploads
        assert (begin.receiver, begin.version, begin.generation) == (f"s{index}", 0, 1)
        assert begin.sender == play.session.id
        assert list(slices) == [index]
    assert play.shards[0].uploads[0][1][0].tolist() == [5.0] * 4


def test_an_upload_that_fails_is_repeated_when_the_plan_is(stage):
    play = stage()
    plan = jobs.plan(play.entry(), sources=True)
    play.freeze()
    (shard,) = play.shards
    shard.upload_errors = [ShardUnavailable("away")]
    play.control.say(PlanRequest(plan=plan))
    uploaded = threading.Event()
    original = play.transport.upload

    def upload(address, frames):
        reply = original(address, frames)
        uploaded.set()
        return reply

    play.transport.upload = upload
    while not uploaded.is_set():
        play.control.say(PlanRequest(plan=plan))
        play.freeze()  # a round trip, so that requests do not pile up
    assert len(shard.uploads) >= 1


def test_adopting_other_weights_drops_the_gradient_that_was_computed_on_its_own(stage):
    play = stage(weights=7.0)
    play.shards[0].version, play.shards[0].record = 3, record(3, 3)
    play.open(base=3, of=record(3, 3), origin="other")
    assert play.step() is False
    assert play.values == [7.0, 7.0]
    assert (play.session.version, play.session.rank is None) == (3, False)
    assert [begin.push for begin in play.shards[0].begins] == [False]
    assert play.step() is True
    assert play.values == [6.0, 6.0]
    assert play.counts == [(3, 3)]


def test_adopting_the_weights_that_it_had_uses_the_gradient(stage):
    play = stage(weights=0.0)
    play.open(origin="other")
    assert play.step() is True
    assert play.values == [-1.0, -1.0]
    assert [begin.push for begin in play.shards[0].begins] == [False, True]


def test_hello_says_who_it_is_and_what_it_trains(stage):
    play = stage()
    hello = play.transport.hear(Hello)
    assert (hello.id, hello.token) == (play.session.id, "secret")
    assert (hello.worker.job, hello.worker.spec) == (jobs.JOB, SPEC)
    assert hello.worker.on_existing is OnExisting.RESUME
    renewal = play.transport.hear(Renewal)
    assert renewal.standings[0].version == -1


@pytest.mark.parametrize("kind", [ModelMismatch, JobExists])
def test_a_refused_hello_ends_the_step_that_waits_for_it(stage, kind):
    play = stage()
    refusal = Bye(job=jobs.JOB, generation=1 << 30, error=kind("no").info())
    play.control.say(refusal)
    with pytest.raises(kind, match="no"):
        play.step()


def test_a_bye_of_an_older_generation_ends_nothing(stage):
    play = stage()
    play.open(generation=5)
    play.control.say(Bye(job=jobs.JOB, generation=4))
    play.control.say(Notice(job=jobs.JOB, text="hear"))
    play.control.say(Welcome(version="0", lease_s=1, renew_s=1, job_version=3))
    assert play.step()


# --- a step --------------------------------------------------------------------------------------


def test_a_step_pushes_to_every_shard_what_is_placed_there(stage):
    play = stage(shards=2)
    play.open()
    assert play.step()
    for index, shard in enumerate(play.shards):
        (begin,) = shard.begins
        assert (begin.receiver, begin.step, begin.push) == (f"s{index}", 1, True)
        assert (begin.version, begin.slices, begin.present) == (0, (), b"\x03")
    assert play.values == [-1.0, -1.0]
    assert play.step()
    assert play.values == [-2.0, -2.0]
    assert play.counts == [(0, 0), (1, 1)]


def test_an_absent_gradient_is_not_sent(stage):
    play = stage()
    play.open()
    push = play.push()
    part = Push(gradients={1: push.gradients[1]}, settings=push.settings, share=2.5)
    assert play.session.step(part)
    (begin,) = play.shards[0].begins
    assert (begin.present, begin.share) == (b"\x02", 2.5)
    assert play.values == [0.0, -1.0]


def test_a_repeated_stream_is_the_same_push_and_waits_for_the_acknowledge(stage):
    play = stage()
    play.open()
    (shard,) = play.shards
    order: list[str] = []

    def breaks_off(shard, begin, frames):
        yield leading_frame(Acknowledge(version=0))
        next(frames)
        raise ShardUnavailable("broken")

    def watches(shard, begin, frames):
        gradients: list[bytes] = []

        def pull():
            for frame in frames:
                order.append("gradient")
                gradients.append(frame)

        puller = threading.Thread(target=pull, daemon=True)
        puller.start()
        puller.join(0.05)  # time to send what should not be sent yet
        order.append("acknowledge")
        yield leading_frame(Acknowledge(version=0))
        puller.join(WAIT_S)
        shard.take(begin, read(gradients))
        yield from shard.reply(begin)

    shard.script = [breaks_off, watches]
    assert play.step()
    assert order == ["acknowledge", "gradient"]
    assert shard.begins[0] == shard.begins[1]
    assert play.values == [-1.0, -1.0]


def test_a_push_that_is_complete_is_not_sent_again(stage):
    play = stage()
    play.open()
    (shard,) = play.shards
    sent: list[bytes] = []

    def loses_the_reply(shard, begin, frames):
        yield leading_frame(Acknowledge(version=0))
        shard.take(begin, read(frames))
        raise ShardUnavailable("the reply is lost")

    def is_complete(shard, begin, frames):
        yield leading_frame(Acknowledge(version=1, complete=True))
        sent.extend(frames)
        yield from shard.reply(begin)

    shard.script = [loses_the_reply, is_complete]
    assert play.step()
    assert sent == []
    assert play.values == [-1.0, -1.0]


def test_a_reply_that_ends_too_early_is_asked_for_again(stage):
    play = stage()
    play.open()
    (shard,) = play.shards

    def short(shard, begin, frames):
        frames_of = list(honest(shard, begin, frames))
        yield from frames_of[:-1]

    shard.script = [short]
    assert play.step()
    assert play.values == [-1.0, -1.0]
    assert len(shard.begins) == 2


def test_a_reply_that_breaks_inside_a_slice_is_written_again_from_its_start(stage):
    play = stage()
    play.open()
    (shard,) = play.shards

    def torn(shard, begin, frames):
        yield leading_frame(Acknowledge(version=0))
        shard.take(begin, read(frames))
        yield leading_frame(shard.record)
        run, part = piece(0, shard.weights[0], 0, 2)
        yield data_frame([run], [part])
        raise ShardUnavailable("broken")

    shard.script = [torn]
    assert play.step()
    assert play.values == [-1.0, -1.0]


def test_an_error_that_no_repetition_mends_is_raised(stage):
    play = stage(shards=2)
    play.open()
    waiting = threading.Event()

    def refuses(shard, begin, frames):
        assert waiting.wait(WAIT_S)
        raise InvalidRequest("no")
        yield

    def waits(shard, begin, frames):
        yield leading_frame(Acknowledge(version=0))
        read(frames)
        waiting.set()
        assert play.transport.calls["s1:1"].cancelled.wait(WAIT_S)
        yield leading_frame(record(1))

    play.shards[0].script, play.shards[1].script = [refuses], [waits]
    with pytest.raises(InvalidRequest, match="no"):
        play.step()


def test_a_stream_that_begins_after_another_has_failed_does_not_go_on(stage):
    """Nobody would end it: the round that it waits for is never full."""
    play = stage(shards=2)
    play.open()
    failed = threading.Event()
    cancel, push_pull = play.session._streams.cancel, play.transport.push_pull

    def cancelled():
        cancel()
        failed.set()

    def late(address, frames):
        if address == "s1:1":
            assert failed.wait(WAIT_S)
        return push_pull(address, frames)

    def refuses(shard, begin, frames):
        raise InvalidRequest("no")
        yield

    play.session._streams.cancel, play.transport.push_pull = cancelled, late
    play.shards[0].script = [refuses]
    with pytest.raises(InvalidRequest, match="no"):
        play.step()
    assert play.shards[1].begins == []


def test_two_shards_with_different_records_are_a_defect_that_is_said(stage):
    play = stage(shards=2)
    play.open()

    def other_record(shard, begin, frames):
        yield leading_frame(Acknowledge(version=0))
        shard.take(begin, read(frames))
        shard.record = record(1, count=9)
        yield from shard.reply(begin)

    play.shards[1].script = [other_record]
    with pytest.raises(Internal, match="different records of step 1"):
        play.step()


def test_garbage_from_a_shard_is_refused(stage):
    play = stage()
    play.open()
    play.shards[0].script = [lambda shard, begin, frames: iter([b"\xff\xff"])]
    with pytest.raises(InvalidFrame):
        play.step()


def test_what_the_loop_reports_names_the_step_it_has_reached(stage):
    play = stage()
    play.session.log({"loss": 2.0})
    assert play.transport.hear(Logged) == Logged(job=jobs.JOB, step=0, values={"loss": 2.0})
    play.open()
    play.step()
    play.session.log({"loss": 1.0})
    assert play.transport.hear(Logged).step == 1
