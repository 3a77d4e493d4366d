"""A session against scripted shards and a scripted coordinator: what it does when things break."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.client.fakes import WAIT_S, FakeShard, FakeTransport, honest, read, record
from tests.shard import jobs
from tests.shard.tables import piece, together

from adashard import retry
from adashard import session as session_module
from adashard.session import Push, Session
from adashard.wire.errors import (
    AdashardError,
    Internal,
    InvalidFrame,
    InvalidRequest,
    JobExists,
    LeaseExpired,
    ModelMismatch,
    ShardUnavailable,
    StaleGeneration,
)
from adashard.wire.frames import data_frame, leading_frame
from adashard.wire.messages import (
    Acknowledge,
    Bye,
    Freeze,
    Frozen,
    Hello,
    Logged,
    Member,
    Notice,
    OnExisting,
    Open,
    Opened,
    PlanRequest,
    Renewal,
    Welcome,
)

SPEC = jobs.spec((4,), (3,))


class Stage:
    """One session, its shards, and the coordinator's lines."""

    def __init__(self, shards: int = 1, weights: float = 0.0) -> None:
        self.members = [Member(id=f"s{n}", address=f"s{n}:1") for n in range(shards)]
        self.shards = [
            FakeShard({i: torch.full((4 - i,), weights) for i in range(2) if i % shards == n})
            for n in range(shards)
        ]
        addresses = [member.address for member in self.members]
        self.transport = FakeTransport(dict(zip(addresses, self.shards, strict=True)))
        self.parameters = [torch.zeros(4), torch.zeros(3)]
        self.counts: list[tuple[int, ...]] = []
        self.session = Session(
            self.transport,
            "coordinator:1",
            jobs.JOB,
            SPEC,
            self.parameters,
            on_existing=OnExisting.RESUME,
            token="secret",
        )
        self.control = self.transport.control()

    def entry(self, generation: int = 1, *, origin: str | None = None, **options):
        return jobs.entry(
            SPEC,
            generation=generation,
            workers=[self.session.id],
            shards=self.members,
            origin=origin or self.session.id,
            **options,
        )

    def freeze(self, generation: int = 1, **options) -> Frozen:
        self.control.say(Freeze(entry=self.entry(generation, **options)))
        return self.transport.hear(Frozen)

    def open(self, generation: int = 1, base: int = 0, of=None, **options) -> None:
        """All of a change of generation but its uploads."""
        self.freeze(generation, **options)
        self.control.say(Open(plan=jobs.plan(self.entry(generation, **options), base, of)))
        self.transport.hear(Opened)

    def push(self, value: float = 1.0) -> Push:
        def settings(counts):
            self.counts.append(counts)
            return (jobs.group_step(),)

        gradients = {0: torch.full((4,), value), 1: torch.full((3,), value)}
        return Push(gradients=gradients, settings=settings)

    def step(self, value: float = 1.0) -> bool:
        return self.session.step(self.push(value))

    @property
    def values(self) -> list[float]:
        """The value of all elements of each parameter; they never differ."""
        for parameter in self.parameters:
            assert parameter.unique().numel() == 1, "torn"
        return [float(parameter[0]) for parameter in self.parameters]


@pytest.fixture
def stage() -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(*arguments, **options) -> Stage:
        made.append(Stage(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.session.abandon()


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: 0.0)


# --- joining -------------------------------------------------------------------------------------


def test_the_origin_uploads_its_weights_to_where_they_are_placed(stage):
    play = stage(shards=2)
    play.parameters[0].fill_(5.0)
    plan = jobs.plan(play.entry(), sources=True)
    play.freeze()
    play.control.say(PlanRequest(plan=plan))
    play.control.say(Open(plan=plan))
    play.transport.hear(Opened)
    play.step()
    while not all(shard.uploads for shard in play.shards):
        pass  # a thread of its own uploads; the test's own timeout is the limit
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
    cancel_calls, push_pull = play.session._cancel_calls, play.transport.push_pull

    def cancelled():
        cancel_calls()
        failed.set()

    def late(address, frames):
        if address == "s1:1":
            assert failed.wait(WAIT_S)
        return push_pull(address, frames)

    def refuses(shard, begin, frames):
        raise InvalidRequest("no")
        yield

    play.session._cancel_calls, play.transport.push_pull = cancelled, late
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


# --- changes of generation -----------------------------------------------------------------------


def test_a_generation_that_ends_between_the_last_frame_and_the_step_loses_no_record(stage):
    """The record came with the replies, and its generation ended before the step was taken."""
    play = stage()
    play.open()

    def last_words(shard, begin, frames):
        yield from honest(shard, begin, frames)
        play.freeze(generation=2)
        of = record(1, 1)
        plan = jobs.plan(play.entry(2), 1, of)
        opener = threading.Thread(
            target=lambda: (finished.wait(WAIT_S), play.control.say(Open(plan=plan))), daemon=True
        )
        opener.start()

    finished = threading.Event()
    original = play.session._worker.took

    def took(plan, step):
        try:
            return original(plan, step)
        finally:
            finished.set()

    play.session._worker.took = took
    play.shards[0].script = [last_words]
    assert play.step() is True
    assert (play.session.version, play.values) == (1, [-1.0, -1.0])
    assert len(play.shards[0].begins) == 1, "nothing is asked for twice"
    assert play.step() is True
    assert play.counts == [(0, 0), (1, 1)], "step counts come from the record"


@pytest.mark.parametrize("base", [0, 1])
def test_a_freeze_in_the_middle_of_a_reply_ends_it_and_the_step_goes_on_in_the_next(stage, base):
    play = stage()
    play.open()

    def cut_off(shard, begin, frames):
        whole = honest(shard, begin, frames)
        yield next(whole)
        yield next(whole)
        yield next(whole)
        play.freeze(generation=2)
        if base == 0:  # nobody has taken the step: it is formed again
            shard.weights = {i: one + 1.0 for i, one in shard.weights.items()}
            shard.version, shard.record = 0, None
        play.control.say(Open(plan=jobs.plan(play.entry(2), base, record(1) if base else None)))
        yield from whole
        raise AssertionError("it reads on")

    play.shards[0].script = [cut_off]
    assert play.step() is True
    assert play.values == [-1.0, -1.0]
    assert play.session.version == 1


def test_a_shard_that_is_not_open_yet_is_asked_again_a_little_later(stage, monkeypatch):
    play = stage()
    play.open()

    def not_yet(shard, begin, frames):
        raise StaleGeneration("frozen")
        yield

    play.shards[0].script = [not_yet] * 3
    waits: list[float] = []
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: waits.append(high) or 0.0)
    assert play.step()
    assert len(play.shards[0].begins) == 4
    assert waits == sorted(set(waits)), "it does not wait longer each time"
    assert len(waits) == 3


# --- the end -------------------------------------------------------------------------------------


def test_closing_says_that_it_leaves_and_waits_for_the_blessing(stage):
    play = stage()
    play.open()
    play.step()
    play.session.close()
    assert play.transport.closed == 1
    with pytest.raises(LeaseExpired):
        play.step()


def test_closing_twice_and_abandoning_after_it_are_one_end(stage):
    play = stage()
    play.open()
    for _ in range(2):
        play.session.close()
    play.session.abandon()
    with pytest.raises(LeaseExpired):
        play.step()


def test_a_coordinator_that_is_silent_does_not_keep_a_worker(stage):
    play = stage()
    play.transport.blesses = False
    play.session.close(timeout_s=0.0)
    assert play.transport.closed == 1


def test_a_session_that_is_evicted_ends_the_step_that_waits(stage):
    play = stage()
    play.open()

    def evicted(shard, begin, frames):
        yield leading_frame(Acknowledge(version=0))
        play.control.say(Bye(job=jobs.JOB, generation=2, error=LeaseExpired("evicted").info()))
        assert play.transport.calls["s0:1"].cancelled.wait(WAIT_S)
        yield leading_frame(record(1))

    play.shards[0].script = [evicted]
    with pytest.raises(LeaseExpired, match="evicted"):
        play.step()


def test_abandoning_ends_a_step_in_another_thread(stage):
    play = stage()
    play.open()
    waiting = threading.Event()

    def waits(shard, begin, frames):
        yield leading_frame(Acknowledge(version=0))
        waiting.set()
        assert play.transport.calls["s0:1"].cancelled.wait(WAIT_S)
        yield leading_frame(record(1))

    play.shards[0].script = [waits]

    def stepping():
        with pytest.raises(AdashardError):
            play.step()

    together(stepping, lambda: waiting.wait(WAIT_S) and play.session.abandon())


def test_a_shard_that_stays_away_is_given_up_at_the_budget(stage, monkeypatch):
    monkeypatch.setattr(session_module, "STREAM_BUDGET_S", 0.0)
    play = stage()
    play.transport.shards.clear()
    play.open()
    with pytest.raises(ShardUnavailable):
        play.step()


def test_a_step_that_waits_long_says_for_what(stage, monkeypatch, caplog):
    monkeypatch.setattr(session_module, "_SAY_S", 0.001)
    caplog.set_level("INFO", logger="adashard")
    play = stage()
    said = threading.Event()

    class Watch(logging.Handler):
        def emit(self, entry):
            said.set()

    handler = Watch()
    session_module.log.addHandler(handler)
    try:
        together(play.step, lambda: said.wait(WAIT_S) and play.open())
    finally:
        session_module.log.removeHandler(handler)
    assert "the first step needs 1 workers" in caplog.text
