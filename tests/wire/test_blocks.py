"""Elements in int8 on the wire: blocks with a scale, and frames that end where a block does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adashard.wire.blocks import BLOCK_BYTES, BLOCK_ELEMENTS, bytes_of, elements_of
from adashard.wire.errors import InvalidFrame
from adashard.wire.frames import (
    PAYLOAD_BYTES_MAX,
    Extent,
    cut_runs,
    data_frame,
    payload_bytes,
    read_frame,
)
from adashard.wire.messages import Content, Run
from adashard.wire.spec import DType
from adashard.wire.tensors import addend_from, element_count, from_buffer, without_first

counts = st.integers(0, 5 * BLOCK_ELEMENTS) | st.integers(0, 3_000_000)


def run(start: int, count: int, content: Content = Content.WEIGHT) -> Run:
    return Run(slice=0, start=start, count=count, dtype=DType.INT8, content=content)


def frame_of(*runs: Run) -> bytes:
    return data_frame(runs, [memoryview(bytes(sum(bytes_of(one.count) for one in runs)))])


# --- how long they are ---------------------------------------------------------------------------


@given(counts)
def test_every_block_has_one_scale_also_one_that_is_short(count):
    assert bytes_of(count) == count + 4 * len(range(0, count, BLOCK_ELEMENTS))
    assert payload_bytes(DType.INT8, count) == bytes_of(count)


@given(counts)
def test_bytes_say_how_many_elements_they_are(count):
    assert elements_of(bytes_of(count)) == count


# --- as an addend --------------------------------------------------------------------------------


@given(st.integers(0, 4000), st.integers(0, 3))
def test_an_addend_goes_on_behind_any_of_its_blocks(count, blocks):
    data = np.arange(bytes_of(count)).astype(np.uint8)
    addend = addend_from(memoryview(data.tobytes()), DType.INT8)
    assert element_count(addend) == count
    skipped = min(blocks * BLOCK_ELEMENTS, count // BLOCK_ELEMENTS * BLOCK_ELEMENTS)
    rest = without_first(addend, skipped)
    assert element_count(rest) == count - skipped
    assert rest.tolist() == data[bytes_of(skipped) :].tolist()


def test_an_addend_does_not_go_on_inside_a_block():
    addend = addend_from(memoryview(bytes(bytes_of(2000))), DType.INT8)
    with pytest.raises(InvalidFrame, match="7 elements behind a border"):
        without_first(addend, 7)


@given(st.sampled_from([DType.FLOAT32, DType.BFLOAT16, DType.FLOAT64]), st.integers(0, 9))
def test_an_addend_of_floats_is_its_elements(dtype, skipped):
    data = memoryview(bytes(range(payload_bytes(dtype, 9))))
    addend = addend_from(data, dtype)
    assert element_count(addend) == 9
    bits = [one.view(torch.uint8) for one in (addend, from_buffer(data, dtype))]
    assert torch.equal(*bits)
    assert element_count(without_first(addend, skipped)) == 9 - skipped


def test_weights_do_not_come_in_int8():
    with pytest.raises(InvalidFrame, match="INT8"):
        from_buffer(memoryview(bytes(5)), DType.INT8)


# --- in frames -----------------------------------------------------------------------------------

extents = st.lists(
    st.builds(
        lambda index, blocks, count, row: Extent(
            index, count, row, DType.INT8, start=blocks * BLOCK_ELEMENTS
        ),
        st.integers(0, 1000),
        st.integers(0, 2000),
        counts.filter(bool),
        st.integers(1, 10) | st.integers(1, 400_000) | st.sampled_from([256, 768, 4096]),
    ),
    max_size=5,
    unique_by=lambda extent: extent.slice,
)


@given(extents)
def test_frames_cover_each_slice_once_and_their_runs_are_whole_blocks(given_extents):
    came = list(itertools.chain.from_iterable(cut_runs(given_extents)))
    for extent in given_extents:
        start, stop = extent.start, extent.start + extent.count
        while start < stop:
            found = came.pop(0)
            assert (found.slice, found.start) == (extent.slice, start)
            start += found.count
            assert start == stop or start % BLOCK_ELEMENTS == 0
        assert start == stop
    assert came == []


@given(extents)
def test_no_frame_of_int8_is_longer_than_a_mebibyte(given_extents):
    for runs in cut_runs(given_extents):
        assert sum(bytes_of(one.count) for one in runs) <= PAYLOAD_BYTES_MAX


@given(st.integers(1, 6000).map(lambda n: 4 * n), st.sampled_from([256, 512, 768, 1024, 3072]))
def test_frames_of_usual_widths_end_between_blocks_of_four_rows(rows, row):
    for runs in cut_runs([Extent(0, rows * row, row, DType.INT8)]):
        assert (runs[-1].start + runs[-1].count) % (4 * row) == 0


def test_a_frame_has_as_many_whole_blocks_as_fit_where_four_rows_do_not():
    first, *_ = cut_runs([Extent(0, 4_000_000, 50_257, DType.INT8)])
    assert [one.count for one in first] == [PAYLOAD_BYTES_MAX // BLOCK_BYTES * BLOCK_ELEMENTS]


@given(st.lists(counts.filter(lambda count: count < 9000), min_size=1, max_size=4), st.data())
def test_runs_of_int8_come_back_with_their_blocks(all_counts, data):
    runs = [
        Run(slice=index, start=0, count=count, dtype=DType.INT8)
        for index, count in enumerate(all_counts)
    ]
    fill = data.draw(st.integers(0, 255))
    parts = [memoryview(bytes([fill]) * bytes_of(count)) for count in all_counts]
    frame = read_frame(data_frame(runs, parts))
    assert [(one, bytes(part)) for one, part in frame.pieces()] == [
        (one, bytes(part)) for one, part in zip(runs, parts, strict=True)
    ]


@pytest.mark.parametrize("start", [1, 1023, 1025, 4 * BLOCK_ELEMENTS - 4])
def test_a_run_that_begins_inside_a_block_is_refused(start):
    assert read_frame(frame_of(run(3 * BLOCK_ELEMENTS, 10))).runs
    with pytest.raises(InvalidFrame, match="not possible"):
        read_frame(frame_of(run(start, 10)))


@pytest.mark.parametrize("content", [one for one in Content if one is not Content.WEIGHT])
def test_state_in_int8_is_refused(content):
    with pytest.raises(InvalidFrame, match="not possible"):
        read_frame(frame_of(run(0, 10, content)))


@pytest.mark.parametrize("change", [-5, -1, 1, 4])
def test_a_payload_of_another_length_than_its_blocks_is_refused(change):
    payload = memoryview(bytes(bytes_of(2000) + change))
    with pytest.raises(InvalidFrame, match="came with a payload"):
        read_frame(data_frame([run(0, 2000)], [payload]))
