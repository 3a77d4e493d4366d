"""Slices on their way: whole and right, or not there at all."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.shard.tables import piece

from adashard.arrivals import Arrival, Arrivals, Part
from adashard.wire.errors import DamagedFrame, InvalidFrame
from adashard.wire.messages import Content, Run
from adashard.wire.spec import DType

KINDS = (Content.WEIGHT, Content.ROW, Content.COLUMN)
COUNTS = {0: (12, 3, 4), 1: (6, 2, 3), 2: (1, 1, 1)}


def parts(index: int) -> dict[Content, Part]:
    if index not in COUNTS:
        raise InvalidFrame(f"there is no slice {index}")
    return {
        kind: Part(DType.FLOAT32, count) for kind, count in zip(KINDS, COUNTS[index], strict=True)
    }


def values(index: int, kind: Content) -> torch.Tensor:
    return 100.0 * index + 10.0 * kind + torch.arange(float(COUNTS[index][KINDS.index(kind)]))


def runs_of(index: int, borders=()) -> list[tuple[Run, memoryview]]:
    """A slice, weights first, each tensor cut at these borders."""
    found = []
    for kind, count in zip(KINDS, COUNTS[index], strict=True):
        cuts = sorted({0, count, *(border for border in borders if border < count)})
        for start, stop in itertools.pairwise(cuts):
            found.append(piece(index, values(index, kind), start, stop, kind))
    return found


def check(arrival: Arrival | None, index: int) -> None:
    """It is the slice, and what it has is what was sent."""
    assert arrival is not None
    assert (arrival.slice, tuple(arrival.pieces)) == (index, KINDS)
    for kind, came in arrival.pieces.items():
        expected, buffer = piece(index, values(index, kind))
        assert b"".join(came.buffers) == buffer
        assert (came.checksum, came.dtype) == (expected.checksum, DType.FLOAT32)


borders = st.lists(st.integers(1, 11), max_size=4)


@given(st.permutations(list(COUNTS)), borders)
def test_a_slice_is_there_with_the_last_element_of_its_state_and_not_before(order, borders):
    arrivals = Arrivals(parts)
    for index in order:
        *most, last = runs_of(index, borders)
        assert [arrivals.take(*one) for one in most] == [None] * len(most)
        check(arrivals.take(*last), index)


@given(st.lists(st.tuples(st.sampled_from(list(COUNTS)), st.integers(1, 20)), max_size=6), borders)
def test_a_stream_that_broke_off_anywhere_leaves_nothing_in_the_next(broken, borders):
    arrivals = Arrivals(parts)
    for index, stop in broken:
        runs = runs_of(index, borders)
        for one in runs[: min(stop, len(runs) - 1)]:
            assert arrivals.take(*one) is None
    whole = [arrivals.take(*one) for one in runs_of(1, borders)]
    check(whole[-1], 1)
    assert whole[:-1] == [None] * (len(whole) - 1)


@given(st.sampled_from(list(COUNTS)), borders, st.data())
def test_a_byte_that_was_turned_is_noticed_in_its_own_run_and_the_slice_comes_again(
    index, borders, data
):
    arrivals, runs = Arrivals(parts), runs_of(index, borders)
    turned = data.draw(st.integers(0, len(runs) - 1))
    for run, buffer in runs[:turned]:
        arrivals.take(run, buffer)
    run, buffer = runs[turned]
    damaged = bytearray(buffer)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DamagedFrame, match=f"of slice {index} came damaged"):
        arrivals.take(run, memoryview(damaged))
    with pytest.raises(InvalidFrame, match="goes on"):
        arrivals.take(*(runs[turned] if turned else runs_of(index, [1])[-1]))
    check([arrivals.take(*one) for one in runs][-1], index)


@given(st.sampled_from(list(COUNTS)), borders)
def test_what_has_come_is_not_copied(index, borders):
    arrivals, runs = Arrivals(parts), runs_of(index, borders)
    whole = [arrivals.take(*one) for one in runs][-1]
    sent = [buffer.obj for _, buffer in runs]
    came = [buffer.obj for one in whole.pieces.values() for buffer in one.buffers]
    assert list(map(id, came)) == list(map(id, sent))


def test_a_run_without_elements_says_that_its_slice_is_unchanged():
    unchanged = Run(slice=2, start=0, count=0, dtype=DType.FLOAT32)
    assert Arrivals(parts).take(unchanged, memoryview(b"")) == Arrival(slice=2)


FIRST, BUFFER = piece(0, values(0, Content.WEIGHT), 0, 4)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (replace(FIRST, slice=3), "there is no slice 3"),
        (replace(FIRST, start=5), "goes on at element 4 of 12"),
        (replace(FIRST, start=3), "goes on at element 4 of 12"),
        (replace(FIRST, start=4, count=9), "goes on at element 4 of 12"),
        (replace(FIRST, slice=1, start=4), "slice 0 goes on"),
        (replace(FIRST, slice=1, content=Content.ROW), "slice 0 goes on"),
        (replace(FIRST, content=Content.VECTOR), "slice 0 has no vector here"),
        (replace(FIRST, start=4, dtype=DType.BFLOAT16), "BFLOAT16, and FLOAT32 was wanted"),
    ],
    ids=["slice", "gap", "again", "too long", "between", "state alone", "kind", "format"],
)
def test_what_does_not_come_next_is_refused(bad, words):
    arrivals = Arrivals(parts)
    assert arrivals.take(FIRST, BUFFER) is None
    with pytest.raises(InvalidFrame, match=words):
        arrivals.take(bad, BUFFER)
    rest = piece(0, values(0, Content.WEIGHT), 4, 12)
    assert arrivals.take(*rest) is None, "what was refused has changed nothing"
