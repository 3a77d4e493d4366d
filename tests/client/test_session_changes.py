"""A session through changes of generation, to its end."""

from __future__ import annotations

import logging
import threading

import pytest
from tests.client.fakes import WAIT_S, honest, record
from tests.shard import jobs
from tests.shard.tables import together

from adashard import retry, streams
from adashard import session as session_module
from adashard.wire.control import Bye, Open
from adashard.wire.errors import (
    AdashardError,
    LeaseExpired,
    ShardUnavailable,
    StaleGeneration,
)
from adashard.wire.frames import leading_frame
from adashard.wire.messages import Acknowledge

pytestmark = pytest.mark.usefixtures("no_waits")


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
    monkeypatch.setattr(retry, "uniform", lambda low, high: waits.append(high) or 0.0)
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
    monkeypatch.setattr(streams, "STREAM_BUDGET_S", 0.0)
    play = stage()
    play.transport.shards.clear()
    play.open()
    with pytest.raises(ShardUnavailable):
        play.step()


def test_a_step_that_waits_long_says_for_what(stage, monkeypatch, caplog):
    monkeypatch.setattr(session_module, "SAY_S", 0.001)
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
