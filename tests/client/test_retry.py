"""Which errors are worth another try, and when to give up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adashard import retry
from adashard.retry import Backoff, repeatable
from adashard.wire.errors import catalogue

REPEATABLE = {
    "ShardUnavailable",
    "CannotReachServer",
    "DamagedFrame",
    "Draining",
    "Overloaded",
}


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_only_a_server_that_is_away_or_full_is_called_again(name):
    assert repeatable(catalogue()[name]("what")) == (name in REPEATABLE)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 2000))
def test_waits_grow_to_a_bound_and_stay_there(attempts):
    backoff = Backoff(1.0, Clock(), first_s=0.1, longest_s=2.0)
    for attempt in range(1, attempts + 1):
        wait_s = backoff.next_s()
        assert wait_s is not None
        assert 0 <= wait_s <= min(2.0, 0.1 * 2.0 ** min(attempt - 1, 30))
    assert backoff.attempts == attempts


def test_waits_are_drawn_from_the_whole_range(monkeypatch):
    """Full jitter: many clients that fail together do not come back together."""
    ranges = []
    monkeypatch.setattr(retry, "uniform", lambda *between: ranges.append(between) or 0.0)
    backoff = Backoff(1.0, Clock(), first_s=0.5, longest_s=1.5)
    for _ in range(4):
        backoff.next_s()
    assert ranges == [(0.0, 0.5), (0.0, 1.0), (0.0, 1.5), (0.0, 1.5)]


@given(st.floats(0, 100), st.floats(0, 200))
def test_it_gives_up_when_the_budget_is_spent(budget_s, passed_s):
    clock = Clock()
    backoff = Backoff(budget_s, clock)
    clock.now += passed_s
    assert (backoff.next_s() is None) == (backoff.spent_s >= budget_s)
    assert backoff.attempts == 1
    assert backoff.spent_s == pytest.approx(passed_s, abs=1e-9)
