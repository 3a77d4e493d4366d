"""Two members that live and cannot reach each other: one of them goes (C9)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adashard_server.cluster.links import broken_links, to_evict

NAMES = [f"m{n}" for n in range(6)]
REPORTS = st.dictionaries(st.sampled_from(NAMES), st.sets(st.sampled_from(NAMES), max_size=6))
LIVING = st.lists(st.tuples(st.sampled_from(NAMES), st.booleans()), unique_by=lambda one: one[0])


@given(REPORTS, LIVING.map(dict))
def test_who_goes_lives_and_no_other_has_more_broken_links(reports, living):
    counts = broken_links(reports, living)
    chosen = to_evict(reports, living)
    assert (chosen is None) == (not counts)
    if chosen is not None:
        assert chosen[0] in living
        assert chosen[1] == max(counts.values())


@given(REPORTS, LIVING.map(dict))
def test_a_link_has_two_ends_whoever_reports_it(reports, living):
    back = {member: {one for one in reports if member in reports[one]} for member in NAMES}
    assert broken_links(reports, living) == broken_links(back, living)


@given(REPORTS, LIVING.map(dict))
def test_once_those_who_are_chosen_are_dead_no_link_is_broken(reports, living):
    while (chosen := to_evict(reports, living)) is not None:
        del living[chosen[0]]
    assert all(
        peer == member or peer not in living or member not in living
        for member, peers in reports.items()
        for peer in peers
    )


@given(REPORTS)
def test_links_of_the_dead_are_nobodys_business(reports):
    assert to_evict(reports, {"m0": True}) is None
    assert to_evict(reports, {}) is None


def test_a_shard_that_nobody_reaches_goes_rather_than_its_workers():
    living = {"shard": False, "w0": True, "w1": True}
    assert to_evict({"w0": {"shard"}, "w1": {"shard"}}, living) == ("shard", 2)


def test_at_a_tie_a_worker_goes_before_a_shard_and_the_youngest_first():
    assert to_evict({"w0": {"s0"}}, {"w0": True, "s0": False}) == ("w0", 1)
    assert to_evict({"s0": {"s1"}}, {"s0": False, "s1": False}) == ("s1", 1)
    reports = {"w0": {"s0"}, "w1": {"s1"}}
    assert to_evict(reports, {"s0": False, "s1": False, "w0": True, "w1": True}) == ("w1", 1)
