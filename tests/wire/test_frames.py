"""Frames: what is written is valid protobuf, what is read is believed only after it was checked."""

from __future__ import annotations

import itertools
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.wire.test_codec import DESCRIPTORS, instances

from adashard.wire import codec
from adashard.wire.checksums import RunningChecksums
from adashard.wire.errors import InvalidFrame
from adashard.wire.frames import (
    FRAME_BYTES_MAX,
    HEADER_BYTES_MAX,
    ITEM_BYTES,
    PAYLOAD_BYTES_MAX,
    RUNS_MAX,
    Extent,
    cut_runs,
    data_frame,
    leading_frame,
    read_frame,
)
from adashard.wire.messages import Acknowledge, Begin, Content, Run, UploadBegin
from adashard.wire.spec import DType
from adashard.wire.v1 import shard_pb2

DTYPES = sorted(ITEM_BYTES)
LEADING = ("Begin", "Acknowledge", "Record", "UploadBegin")
leadings = st.one_of([instances(DESCRIPTORS[name]) for name in LEADING])
runs = st.builds(
    Run,
    slice=st.integers(0, 2**31 - 1),
    start=st.integers(0, 2**62),
    count=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    checksum=st.integers(0, 2**32 - 1),
)


@st.composite
def data_frames(draw, least: int = 1) -> tuple[list[Run], list[bytes]]:
    """Runs, and the bytes of each."""
    drawn = draw(st.lists(runs, min_size=least, max_size=12))
    sizes = [run.count * ITEM_BYTES[run.dtype] for run in drawn]
    return drawn, [draw(st.binary(min_size=size, max_size=size)) for size in sizes]


def encoded(drawn: list[Run], parts: list[bytes]) -> bytes:
    return data_frame(drawn, [memoryview(part) for part in parts])


# --- writing and reading -------------------------------------------------------------------------


@given(data_frames())
def test_runs_and_their_elements_come_back_as_they_were(drawn):
    frame = read_frame(encoded(*drawn))
    assert frame.leading is None
    assert [(run, bytes(part)) for run, part in frame.pieces()] == list(zip(*drawn, strict=True))


@given(leadings)
def test_a_leading_message_comes_back_as_it_was(message):
    frame = read_frame(leading_frame(message))
    assert frame.leading == message
    assert (frame.runs, bytes(frame.payload)) == ((), b"")


@given(data_frames())
def test_generated_code_reads_a_data_frame_that_was_written_by_hand(drawn):
    frame = shard_pb2.Frame.FromString(encoded(*drawn))
    assert [codec.from_proto(run) for run in frame.header.runs] == drawn[0]
    assert frame.payload == b"".join(drawn[1])
    assert frame.header.WhichOneof("kind") is None
    assert not frame.header.padding.strip(b"\0")


@given(leadings)
def test_generated_code_reads_a_leading_frame_that_was_written_by_hand(message):
    header = shard_pb2.Frame.FromString(leading_frame(message)).header
    assert codec.from_proto(getattr(header, header.WhichOneof("kind"))) == message


@given(data_frames(), st.binary(max_size=70))
def test_what_generated_code_writes_is_read(drawn, padding):
    header = shard_pb2.Header(runs=map(codec.to_proto, drawn[0]), padding=padding)
    written = shard_pb2.Frame(header=header, payload=b"".join(drawn[1]))
    frame = read_frame(written.SerializeToString())
    assert [(run, bytes(part)) for run, part in frame.pieces()] == list(zip(*drawn, strict=True))


@given(st.sampled_from(LEADING), st.data())
def test_a_leading_message_that_generated_code_writes_is_read(name, data):
    message = data.draw(instances(DESCRIPTORS[name]))
    field = {"UploadBegin": "upload"}.get(name, name.lower())
    written = shard_pb2.Frame(header=shard_pb2.Header(**{field: codec.to_proto(message)}))
    assert read_frame(written.SerializeToString()).leading == message


def test_the_payload_is_a_view_of_what_arrived():
    data = encoded([Run(slice=0, start=0, count=2, dtype=DType.FLOAT32)], [b"12345678"])
    frame = read_frame(data)
    assert frame.payload.obj is data
    assert all(part.obj is data for _, part in frame.pieces())


def test_fields_of_a_later_version_are_passed_over():
    data = encoded([Run(slice=0, start=0, count=1, dtype=DType.FLOAT16)], [b"ab"])
    assert read_frame(data + b"\x1a\x03new").runs == read_frame(data).runs


@given(st.binary(min_size=4, max_size=400), st.sets(st.integers(1, 99)))
def test_runs_carry_the_checksum_of_their_content_up_to_their_end(data, borders):
    """That of zlib, over all frames of the stream, for each content of each slice by itself."""
    count = len(data) // 4
    cuts = sorted({0, count, *(border for border in borders if border < count)})
    checksums, frames = RunningChecksums(), []
    for start, stop in itertools.pairwise(cuts):
        both = [
            Run(slice=0, start=start, count=stop - start, dtype=DType.FLOAT32, content=content)
            for content in (Content.WEIGHT, Content.ROW)
        ]
        parts = [memoryview(data)[4 * start : 4 * stop], memoryview(bytes(4 * (stop - start)))]
        frames.append(read_frame(data_frame(both, parts, checksums)))
    for frame, stop in zip(frames, cuts[1:], strict=True):
        expected = [zlib.crc32(data[: 4 * stop]), zlib.crc32(bytes(4 * stop))]
        assert [run.checksum for run in frame.runs] == expected


def test_a_content_that_begins_anew_has_a_checksum_of_its_own():
    checksums, run = RunningChecksums(), Run(slice=0, start=0, count=1, dtype=DType.FLOAT32)
    for _ in range(2):
        assert checksums.after(run, memoryview(b"abcd")) == zlib.crc32(b"abcd")


# --- where the payload starts --------------------------------------------------------------------


@given(data_frames())
def test_the_payload_starts_at_a_multiple_of_64(drawn):
    data = encoded(*drawn)
    assert (len(data) - sum(map(len, drawn[1]))) % 64 == 0


def header_of(size_bytes: int) -> list[Run]:
    """Runs without elements that are so many bytes of a header: pieces of 4, 6 and 7."""
    index_of = {4: 0, 6: 1, 7: 200}
    odd, rest = size_bytes % 2, size_bytes - 7 * (size_bytes % 2)
    pieces = [7] * odd + [6] * (rest % 4 // 2)
    pieces += [4] * ((rest - sum(pieces[odd:])) // 4)
    assert sum(pieces) == size_bytes
    return [Run(slice=index_of[piece], start=0, count=0, dtype=DType.FLOAT32) for piece in pieces]


@pytest.mark.parametrize("payload_bytes", [0, 2, 126, 128, 16_382, 16_384, PAYLOAD_BYTES_MAX])
def test_padding_fits_every_length_of_a_header(payload_bytes):
    """Padding makes the header longer, which may make the number that says so longer."""
    more = Run(slice=0, start=0, count=payload_bytes // 2, dtype=DType.FLOAT16)
    payload = memoryview(bytes(payload_bytes))
    for size in range(13, 300):
        data = data_frame([*header_of(size), more], [payload])
        assert (len(data) - payload_bytes) % 64 == 0
        assert len(read_frame(data).payload) == payload_bytes


@pytest.mark.parametrize("payload_bytes", [0, 2])
def test_padding_fits_where_the_length_of_a_header_grows_to_three_bytes(payload_bytes):
    more = Run(slice=0, start=0, count=payload_bytes // 2, dtype=DType.FLOAT16)
    for size in range(16_300, 16_390):
        data = data_frame([*header_of(size), more], [memoryview(bytes(payload_bytes))])
        assert (len(data) - payload_bytes) % 64 == 0


# --- how slices are cut into frames --------------------------------------------------------------

extents = st.lists(
    st.builds(
        Extent,
        slice=st.integers(0, 1000),
        count=st.integers(0, 40) | st.integers(1, 1_500_000),
        row=st.integers(1, 10) | st.integers(1, 400_000),
        dtype=st.sampled_from(DTYPES),
        start=st.integers(0, 40) | st.integers(0, 1_500_000),
    ),
    max_size=8,
)


@given(extents)
def test_frames_cover_each_extent_exactly_once_and_in_order(given_extents):
    came = [run for frame in cut_runs(given_extents) for run in frame]
    for extent in given_extents:
        start, stop = extent.start, extent.start + extent.count
        while start < stop:
            run = came.pop(0)
            assert (run.slice, run.start, run.dtype) == (extent.slice, start, extent.dtype)
            assert run.count > 0
            start += run.count
        assert start == stop
        if not extent.count:
            run = came.pop(0)
            assert (run.slice, run.start, run.count) == (extent.slice, extent.start, 0)
    assert came == []


@given(extents)
def test_no_frame_is_longer_than_a_mebibyte_or_empty(given_extents):
    for frame in cut_runs(given_extents):
        assert frame
        assert sum(run.count * ITEM_BYTES[run.dtype] for run in frame) <= PAYLOAD_BYTES_MAX


@given(extents)
def test_a_frame_ends_between_blocks_of_four_rows_unless_one_is_longer_than_a_frame(given_extents):
    # One row length and count per slice; the strategy may draw a slice twice.
    by_slice = {extent.slice: extent for extent in given_extents}
    for frame in cut_runs(by_slice.values()):
        for run in frame:
            extent, stop = by_slice[run.slice], run.start + run.count
            if stop != extent.start + extent.count and stop % (4 * extent.row):
                assert frame == (run,)
                assert run.count * ITEM_BYTES[run.dtype] == PAYLOAD_BYTES_MAX
                assert run.start // (4 * extent.row) == stop // (4 * extent.row)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_slices_that_fit_into_one_frame_share_it(counts):
    small = [Extent(index, count, 7, DType.FLOAT32) for index, count in enumerate(counts)]
    assert len(list(cut_runs(small))) == 1


def test_a_slice_that_does_not_fit_behind_others_begins_a_frame_of_its_own():
    small, large = Extent(0, 1, 1, DType.FLOAT32), Extent(1, 300_000, 300_000, DType.FLOAT32)
    first, second, third = cut_runs([small, large])
    assert [[run.slice for run in frame] for frame in (first, second, third)] == [[0], [1], [1]]


def test_a_frame_has_no_more_runs_than_are_read():
    tiny = [Extent(index, 1, 1, DType.FLOAT16) for index in range(RUNS_MAX + 1)]
    first, second = cut_runs(tiny)
    assert (len(first), len(second)) == (RUNS_MAX, 1)
    payload = memoryview(bytes(2 * RUNS_MAX))
    assert read_frame(data_frame(first, [payload])).runs == first


def test_of_no_slices_there_are_no_frames():
    assert list(cut_runs([])) == []


# --- what is refused -----------------------------------------------------------------------------


def is_read_or_refused(data: bytes) -> None:
    """Nothing but InvalidFrame is raised, and what is read fits together."""
    try:
        frame = read_frame(data)
    except InvalidFrame:
        return
    assert (frame.leading is None) == bool(frame.runs)
    assert sum(len(part) for _, part in frame.pieces()) == len(frame.payload)
    assert all(run.slice >= 0 and run.start >= 0 for run in frame.runs)


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_read_or_refused(data):
    is_read_or_refused(data)


@settings(max_examples=300)
@given(st.binary(max_size=120), st.binary(max_size=40))
def test_arbitrary_headers_and_payloads_are_read_or_refused(header, payload):
    """Well-formed on the outside, so that the fuzz gets further in."""
    is_read_or_refused(
        b"\x0a" + bytes([len(header)]) + header + b"\x12" + bytes([len(payload)]) + payload
    )


@st.composite
def mutated(draw) -> bytes:
    """A valid frame with a few bits flipped, bytes cut out, put in or said twice."""
    valid = draw(data_frames().map(lambda drawn: encoded(*drawn)) | leadings.map(leading_frame))
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at, to = sorted(draw(st.lists(st.integers(0, len(data)), min_size=2, max_size=2)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat", "truncate"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:to]
            case "insert":
                data[at:at] = draw(st.binary(max_size=12))
            case "repeat":
                data[at:at] = data[at:to]
            case _:
                del data[to:]
    return bytes(data)


@settings(max_examples=300)
@given(mutated())
def test_a_frame_that_was_tampered_with_is_read_or_refused(data):
    is_read_or_refused(data)


@given(data_frames().filter(lambda drawn: any(drawn[1])), st.data())
def test_a_data_frame_that_breaks_off_is_refused(drawn, data):
    whole = encoded(*drawn)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(InvalidFrame):
        read_frame(whole[:cut])


@given(leadings, st.data())
def test_a_leading_frame_that_breaks_off_is_refused(message, data):
    whole = leading_frame(message)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(InvalidFrame):
        read_frame(whole[:cut])


def with_runs(**fields: int) -> bytes:
    run = {"slice": 0, "start": 0, "count": 1, "dtype": 1, "content": 1, **fields}
    size = max(run["count"], 0) * 4
    header = shard_pb2.Header(runs=[shard_pb2.Run(**run)])
    return shard_pb2.Frame(header=header, payload=bytes(size)).SerializeToString()


def both_kinds() -> bytes:
    header = shard_pb2.Header(acknowledge=shard_pb2.Acknowledge(version=1))
    header.runs.add(slice=0, start=0, count=0, dtype=1)
    return shard_pb2.Frame(header=header).SerializeToString()


def too_many_runs() -> bytes:
    header = shard_pb2.Header(runs=[shard_pb2.Run(dtype=1)] * (RUNS_MAX + 1))
    return shard_pb2.Frame(header=header).SerializeToString()


ACKNOWLEDGE = leading_frame(Acknowledge(version=1))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "a leading message or runs, and not both"),
        (b"\x0a\x00", "a leading message or runs, and not both"),
        (both_kinds(), "a leading message or runs, and not both"),
        (bytes(FRAME_BYTES_MAX + 1), "over the limit"),
        (b"\x0a\x81\x80\x80\x04" + bytes(HEADER_BYTES_MAX + 1), "a header of"),
        (b"\x12\x81\x80\x40" + bytes(PAYLOAD_BYTES_MAX + 1), "a leading message or runs"),
        (ACKNOWLEDGE + ACKNOWLEDGE, "field 1 of a frame stands in it twice"),
        (ACKNOWLEDGE + b"\x12\x01x", "runs of 0 bytes came with a payload of 1"),
        (b"\x08\x01", "only length-delimited fields, not wire type 0"),
        (b"\x0b", "not wire type 3"),
        (b"\x0a", "ends inside a number"),
        (b"\x0a\x80", "ends inside a number"),
        (b"\x0a\x05ab", "ends 3 bytes too early"),
        (b"\xff" * 11, "longer than ten bytes"),
        (b"\x0a\x02\xff\xff", "header of a frame cannot be read"),
        (too_many_runs(), f"{RUNS_MAX + 1} runs"),
        (with_runs(slice=-1), "a run is not possible"),
        (with_runs(start=-1), "a run is not possible"),
        (with_runs(count=-1), "a run is not possible"),
        (with_runs(dtype=0), "a run is not possible"),
        (with_runs(dtype=99), "header of a frame cannot be read"),
        (with_runs(dtype=4), "runs of 8 bytes came with a payload of 4"),
    ],
)
def test_a_frame_that_cannot_be_right_is_refused_with_the_reason(data, words):
    with pytest.raises(InvalidFrame, match=words):
        read_frame(data)


def test_a_payload_over_a_mebibyte_is_refused():
    run = shard_pb2.Run(slice=0, start=0, count=(PAYLOAD_BYTES_MAX >> 2) + 1, dtype=1)
    frame = shard_pb2.Frame(header=shard_pb2.Header(runs=[run]), payload=bytes(run.count * 4))
    with pytest.raises(InvalidFrame, match=f"payload of {run.count * 4} bytes is over"):
        read_frame(frame.SerializeToString())


def test_an_enum_of_no_meaning_in_a_leading_message_is_refused_by_name():
    header = shard_pb2.Header(begin=shard_pb2.Begin(dtypes=[77]))
    with pytest.raises(InvalidFrame, match="'dtypes' of a Begin is 77"):
        read_frame(shard_pb2.Frame(header=header).SerializeToString())


def test_a_leading_message_that_nobody_would_read_is_not_written():
    begin = Begin(
        job="j",
        generation=1,
        sender="w",
        receiver="s",
        step=1,
        push=True,
        present=bytes(HEADER_BYTES_MAX),
    )
    with pytest.raises(InvalidFrame, match=r"a Begin of \d+ bytes is over the limit"):
        leading_frame(begin)


def test_the_longest_frames_that_are_written_are_read():
    upload = UploadBegin(
        job="j" * (HEADER_BYTES_MAX - 50), generation=1, sender="w", receiver="s", version=0
    )
    assert read_frame(leading_frame(upload)).leading == upload
    full = Run(slice=0, start=0, count=PAYLOAD_BYTES_MAX >> 2, dtype=DType.FLOAT32)
    assert read_frame(encoded([full], [bytes(PAYLOAD_BYTES_MAX)])).runs == (full,)
