"""A process that dies is started again, unless that would not help."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adashard.wire.errors import (
    AdashardError,
    CannotReachServer,
    Internal,
    InvalidSettings,
    PortInUse,
    Unauthenticated,
    VersionSkew,
)
from adashard_server.launch.restarts import (
    DEATHS_MAX,
    FIRST_WAIT_S,
    LONGEST_WAIT_S,
    STEADY_S,
    TAKEN_OVER,
    Again,
    GiveUp,
    Leave,
    Restarts,
)

KILLED = -9


def deaths(*lives_s: float, code: int = KILLED, error: AdashardError | None = None) -> list:
    """What is decided at the end of each life."""
    restarts, now, decided = Restarts("shard-0"), 0.0, []
    for life_s in lives_s:
        restarts.began(now)
        now += life_s
        decided.append(restarts.ended(code, error, now))
    return decided


@pytest.mark.parametrize("life_s", [0.0, STEADY_S, 1e6])
def test_the_first_death_is_made_good_at_once(life_s: float):
    assert deaths(life_s) == [Again(0.0)]


def test_each_quick_death_is_followed_by_twice_the_wait_until_it_is_given_up():
    *again, last = deaths(*[1.0] * DEATHS_MAX)
    assert again == [Again(wait) for wait in (0.0, *(FIRST_WAIT_S * n for n in (1, 2, 4)))]
    assert isinstance(last, GiveUp)
    assert f"shard-0 has died {DEATHS_MAX} times in a row" in last.why
    assert "signal 9" in last.why


@given(st.lists(st.floats(0.0, STEADY_S, exclude_max=True), max_size=DEATHS_MAX - 2))
def test_a_steady_life_lets_what_was_before_be_forgotten(quick: list[float]):
    assert deaths(*quick, STEADY_S + 1.0, 0.0)[-2:] == [Again(0.0), Again(0.0)]


@given(st.lists(st.floats(0.0, 2 * STEADY_S), min_size=1, max_size=50))
def test_no_wait_is_longer_than_the_longest(lives_s: list[float]):
    absent = CannotReachServer("the registry does not answer")
    waits = [one.wait_s for one in deaths(*lives_s, code=1, error=absent)]
    assert all(0.0 <= wait <= LONGEST_WAIT_S for wait in waits)


def test_what_misses_another_process_is_started_until_that_is_there():
    absent = CannotReachServer("the registry does not answer")
    decided = deaths(*[0.1] * 10 * DEATHS_MAX, code=1, error=absent)
    assert decided[-1] == Again(LONGEST_WAIT_S)


@pytest.mark.parametrize("error", [PortInUse("taken"), Internal("a defect"), None])
def test_whatever_else_it_says_it_is_given_up_after_some_deaths(error: AdashardError | None):
    decided = deaths(*[0.1] * DEATHS_MAX, code=1, error=error)
    assert all(isinstance(one, Again) for one in decided[:-1])
    assert isinstance(decided[-1], GiveUp)
    assert (error.message if error else "exit code 1") in decided[-1].why


@pytest.mark.parametrize("kind", [Unauthenticated, VersionSkew, InvalidSettings])
def test_what_a_restart_does_not_cure_is_given_up_at_once(kind: type[AdashardError]):
    (decided,) = deaths(1e6, code=1, error=kind("so it is"))
    assert isinstance(decided, GiveUp)
    assert "so it is" in decided.why


def test_a_coordinator_that_another_has_replaced_stays_away():
    assert isinstance(deaths(1e6, code=TAKEN_OVER)[0], GiveUp)


def test_a_process_that_was_asked_to_end_is_left():
    assert deaths(0.0, code=0) == [Leave()]
