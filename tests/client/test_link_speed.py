"""How fast pushes go out, and what is chosen for it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adashard.link_speed import (
    BFLOAT16_GBIT_S,
    INT8_GBIT_S,
    LEAST_BYTES,
    STRETCH_BYTES,
    LinkMeter,
    Stretch,
    faster,
    format_for,
)
from adashard.wire.spec import DType

MIB = 1 << 20


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 7.0

    def __call__(self) -> float:
        return self.now


def measured(frames: list[tuple[int, float]]) -> Stretch | None:
    """The fastest stretch of a push whose frames took so many seconds each."""
    clock = Clock()
    meter = LinkMeter(clock)
    meter.began()
    for byte_count, seconds in frames:
        clock.now += seconds
        meter.accepted(byte_count)
    return meter.fastest()


# --- what is chosen ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gbit_s", "chosen"),
    [
        (0.1, DType.INT8),
        (0.95, DType.INT8),
        (1.9, DType.INT8),
        (2.6, DType.BFLOAT16),
        (9.4, DType.BFLOAT16),
        (16.0, None),
        (200.0, None),
    ],
)
def test_the_narrower_the_link_the_narrower_the_format(gbit_s, chosen):
    assert format_for(Stretch(STRETCH_BYTES, STRETCH_BYTES * 8e-9 / gbit_s)) is chosen


@given(st.lists(st.tuples(st.integers(1, 1 << 40), st.floats(1e-9, 1e9)), min_size=2, max_size=2))
def test_a_faster_link_never_gets_a_narrower_format(pairs):
    slow, fast = sorted(itertools.starmap(Stretch, pairs), key=lambda one: one.gbit_s)
    order = [DType.INT8, DType.BFLOAT16, None]
    assert order.index(format_for(slow)) <= order.index(format_for(fast))


def test_what_took_no_time_or_was_not_measured_travels_as_it_is():
    assert format_for(Stretch(STRETCH_BYTES, 0.0)) is None
    assert format_for(None) is None
    assert INT8_GBIT_S < BFLOAT16_GBIT_S


# --- what is measured ----------------------------------------------------------------------------


def test_the_fastest_stretch_counts_so_that_waiting_for_others_does_not():
    waits = [(MIB, 10.0)] + [(MIB, 0.01)] * 47
    found = measured(waits)
    assert found is not None
    assert found.byte_count == STRETCH_BYTES
    assert found.seconds == pytest.approx(0.16)


def test_a_push_that_is_shorter_than_a_stretch_is_measured_as_a_whole():
    found = measured([(MIB, 0.5)] * 3)
    assert found is not None
    assert (found.byte_count, found.seconds) == (3 * MIB, pytest.approx(1.5))


def test_a_tiny_push_says_nothing():
    assert measured([]) is None
    assert measured([(LEAST_BYTES - 1, 9.0)]) is None
    assert LinkMeter(Clock()).fastest() is None


def test_streams_of_one_push_share_the_link():
    clock = Clock()
    meter = LinkMeter(clock)
    for _ in range(4):
        meter.began()
    for _ in range(8):
        clock.now += 1.0
        for _ in range(4):
            meter.accepted(MIB)
    found = meter.fastest()
    assert found is not None
    assert (found.byte_count, found.seconds) == (16 * MIB, pytest.approx(4.0))


@given(st.lists(st.tuples(st.integers(1, 4 * MIB), st.floats(0.001, 1.0)), max_size=60))
def test_no_stretch_is_faster_than_the_fastest_frame(frames):
    found = measured(frames)
    if found is not None:
        best = max(Stretch(*frame).gbit_s for frame in frames)
        assert found.gbit_s <= best * (1 + 1e-9)


def test_of_two_the_faster_counts_and_none_is_no_speed():
    slow, fast = Stretch(MIB, 2.0), Stretch(MIB, 1.0)
    assert faster(slow, fast) == faster(fast, slow) == fast
    assert faster(None, slow) == faster(slow, None) == slow
    assert faster(None, None) is None
