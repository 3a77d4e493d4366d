"""A lease says when a member counts as dead, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adashard.wire.errors import InvalidSettings
from adashard_server.cluster.leases import Leases, LeaseSettings

SETTINGS = LeaseSettings(lease_s=15.0, grace_s=2.0, renew_s=1.0, replace_after_s=5.0)
times = st.floats(0.0, 1000.0)


@pytest.fixture
def leases() -> Leases:
    return Leases(SETTINGS)


def test_a_silent_member_is_dead_at_the_end_of_its_lease_and_not_before(leases: Leases):
    leases.renew("w", 100.0)
    assert leases.dead(114.9) == frozenset()
    assert leases.dead(115.0) == {"w"}


def test_a_member_whose_stream_broke_has_the_grace_period(leases: Leases):
    leases.renew("w", 100.0)
    leases.broken("w", 101.0)
    assert leases.dead(102.9) == frozenset()
    assert leases.dead(103.0) == {"w"}


def test_a_broken_stream_never_makes_a_lease_longer(leases: Leases):
    leases.renew("w", 100.0)
    leases.broken("w", 114.0)
    assert leases.dead(115.0) == {"w"}


def test_a_renewal_revives_a_dead_member(leases: Leases):
    leases.renew("w", 0.0)
    assert leases.dead(20.0) == {"w"}
    leases.renew("w", 20.0)
    assert leases.dead(20.0) == frozenset()


@given(times, times, st.floats(0.0, 14.0))
def test_a_renewal_counts_in_full_whatever_broke_before(start: float, later: float, silent: float):
    leases = Leases(SETTINGS)
    leases.renew("w", start)
    leases.broken("w", start + later)
    leases.renew("w", start + later)
    assert leases.dead(start + later + silent) == frozenset()


def test_nobody_is_dead_who_was_never_heard_or_has_gone_for_good(leases: Leases):
    leases.broken("stranger", 0.0)
    leases.renew("w", 0.0)
    leases.forget("w")
    leases.forget("w")
    assert leases.dead(1000.0) == frozenset()
    assert leases.silent_s("w", 1000.0) == 0.0
    assert leases.dead_since_s("w", 1000.0) == 0.0


def test_after_a_pause_of_its_own_all_leases_start_again(leases: Leases):
    leases.tick(0.0)
    leases.renew("w", 0.0)
    leases.tick(100.0)
    assert leases.dead(100.0) == frozenset()
    assert leases.dead(115.0) == {"w"}


def test_without_a_pause_time_passes_as_it_does(leases: Leases):
    leases.renew("w", 0.0)
    for second in range(0, 16, 5):  # a third of a lease is no pause
        leases.tick(float(second))
    assert leases.dead(15.0) == {"w"}


def test_it_knows_for_how_long_a_member_is_silent_and_dead(leases: Leases):
    leases.renew("w", 100.0)
    assert leases.silent_s("w", 103.0) == 3.0
    assert leases.dead_since_s("w", 110.0) == 0.0
    assert leases.dead_since_s("w", 121.0) == 6.0


@given(times, times)
def test_nothing_that_an_evicted_member_says_revives_it(evicted: float, later: float):
    leases = Leases(SETTINGS)
    leases.renew("w", 0.0)
    leases.revoke("w", evicted)
    leases.tick(evicted)
    leases.renew("w", evicted + later)
    leases.tick(evicted + later)  # perhaps after a pause, when all leases start again
    assert leases.dead(evicted + later) == {"w"}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lease_s", "grace_s", "renew_s", "replace_after_s"])
def test_a_time_that_is_none_is_refused_by_name(name: str, value: float):
    with pytest.raises(InvalidSettings, match=name):
        LeaseSettings(**{name: value})


def test_a_lease_outlives_two_lost_renewals():
    with pytest.raises(InvalidSettings, match="a third of lease_s"):
        LeaseSettings(lease_s=2.9, renew_s=1.0)
