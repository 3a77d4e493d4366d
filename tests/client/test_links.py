"""A request that stays unacknowledged for three leases tells of a broken link."""

from __future__ import annotations

from adashard.transport.links import LEASES, REPEATED_S, Links

LEASE_S = 10.0
LIMIT_S = LEASES * LEASE_S


class Watch:
    """Links with a clock in the test's hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.links = Links(lambda: self.now)
        self.links.lease_s = LEASE_S

    def broken_after(self, seconds: float) -> tuple[str, ...]:
        self.now += seconds
        return self.links.broken()


def test_a_stream_that_nobody_acknowledges_is_broken_after_three_leases_and_not_before():
    watch = Watch()
    watch.links.asked("s0", (1, 1))
    assert watch.broken_after(LIMIT_S - 0.1) == ()
    assert watch.broken_after(0.1) == ("s0",)


def test_an_acknowledgement_makes_the_link_whole_at_any_time():
    watch = Watch()
    watch.links.asked("s0", (1, 1))
    assert watch.broken_after(LIMIT_S) == ("s0",)
    watch.links.answered("s0")
    assert watch.broken_after(LIMIT_S) == ()


def test_a_request_that_is_repeated_counts_from_its_first_time():
    watch = Watch()
    for _ in range(int(LIMIT_S)):
        watch.links.asked("s0", (1, 1))
        watch.links.dropped("s0")  # the connection is refused
        assert watch.broken_after(1.0) == () or watch.now >= 100.0 + LIMIT_S
    assert watch.links.broken() == ("s0",)


def test_a_request_that_nobody_repeats_is_not_wanted_any_more():
    watch = Watch()
    watch.links.asked("s0", (1, 1))
    watch.links.dropped("s0")
    assert watch.broken_after(LIMIT_S) == ()
    watch.links.asked("s0", (1, 1))
    assert watch.links.broken() == ("s0",)
    watch.links.dropped("s0")
    assert watch.broken_after(REPEATED_S + 0.1) == ()


def test_the_next_request_counts_anew():
    watch = Watch()
    watch.links.asked("s0", (1, 1))
    watch.now += LIMIT_S - 1.0
    watch.links.asked("s0", (1, 2))
    assert watch.broken_after(LIMIT_S - 1.0) == ()
    assert watch.broken_after(1.0) == ("s0",)


def test_what_was_never_asked_is_not_broken():
    watch = Watch()
    watch.links.dropped("s0")
    watch.links.answered("s0")
    assert watch.broken_after(1e6) == ()
