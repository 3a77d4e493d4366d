"""Where a step's time goes, as the coordinator hears of it."""

from __future__ import annotations

import itertools

from adashard.wire.messages import GroupStep, Outcome, Record, Schedule
from adashard_server.shard.stopwatch import Stopwatch


def record(step: int, workers: int) -> Record:
    return Record(
        step=step,
        workers=tuple("abc"[:workers]),
        shares=(1.0,) * workers,
        outcome=Outcome.APPLY,
        present=b"\x01",
        step_counts=(step,),
        groups=(GroupStep(schedules=(Schedule(step_count=step, beta2=0.0, rho=1e-2),)),),
    )


def ticking() -> Stopwatch:
    """A stopwatch whose clock shows one second more at every look."""
    ticks = itertools.count()
    return Stopwatch("job", lambda: float(next(ticks)))


def test_a_step_is_told_when_the_last_worker_has_its_reply():
    watch = ticking()
    watch.began(1)
    watch.committed(record(1, workers=2), squared_sum=4.0)
    assert watch.replied(1) is None
    summary = watch.replied(1)
    assert summary is not None
    assert (summary.step, summary.gradient_squared_sum) == (1, 4.0)


def test_a_fast_workers_next_push_does_not_lose_the_step_of_a_slow_one():
    watch = ticking()
    watch.began(1)
    watch.received(1, 10)
    watch.committed(record(1, workers=2), squared_sum=1.0)
    watch.sent(1, 7)
    assert watch.replied(1) is None
    watch.began(2)
    watch.received(2, 100)
    watch.sent(1, 7)
    summary = watch.replied(1)
    assert summary is not None
    assert (summary.step, summary.pushed_bytes, summary.pulled_bytes) == (1, 10, 14)


def test_phases_add_up_to_the_duration():
    watch = ticking()
    watch.began(3)
    watch.pushed(3)
    watch.reported(3)
    watch.committed(record(3, workers=1), squared_sum=0.0)
    watch.applied(3, None, 5, spent_s=0.25)
    summary = watch.replied(3)
    assert summary is not None
    assert sum(summary.phase_s.values()) == summary.duration_s
    assert set(summary.phase_s) == {"receive", "wait", "exchange", "apply", "reply"}


def test_steps_whose_replies_never_ended_are_forgotten():
    watch = ticking()
    for step in range(1, 10):
        watch.began(step)
    assert watch.replied(1) is None
    assert len(watch._steps) <= 2


def test_replies_that_overtake_the_note_of_the_commit_are_counted():
    watch = ticking()
    watch.began(1)
    assert watch.replied(1) is None
    summary = watch.committed(record(1, workers=1), squared_sum=9.0)
    assert summary is not None
    assert summary.gradient_squared_sum == 9.0


def test_no_phase_is_negative_when_moments_are_noted_late():
    watch = ticking()
    watch.began(1)
    watch.committed(record(1, workers=1), squared_sum=0.0)
    watch.reported(1)
    watch.pushed(1)
    summary = watch.replied(1)
    assert summary is not None
    assert all(phase >= 0 for phase in summary.phase_s.values())
