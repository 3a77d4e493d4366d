"""Frames: the bounded pieces in which gradients and weights travel.

A frame is the protobuf message `Frame { Header header = 1; bytes payload = 2; }`. The payload is
up to 1 MiB of tensor elements, so the message is written and read by hand: two tags, two
varints and one join, which is one copy out and none in, where generated code would make two
more each way. What is written stays valid protobuf: any language can speak it with generated
stubs. The header is padded so that the payload starts at a multiple of 64 bytes.

Everything that arrives is checked against a limit before it is believed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from adashard.wire import blocks, codec
from adashard.wire.checksums import RunningChecksums
from adashard.wire.errors import InvalidFrame, InvalidRequest
from adashard.wire.messages import Acknowledge, Begin, Content, Record, Run, UploadBegin
from adashard.wire.spec import DType
from adashard.wire.v1 import shard_pb2

PAYLOAD_BYTES_MAX = 1 << 20
HEADER_BYTES_MAX = 8 << 20
FRAME_BYTES_MAX = PAYLOAD_BYTES_MAX + HEADER_BYTES_MAX + 64
RUNS_MAX = 1 << 16
ITEM_BYTES = {DType.FLOAT32: 4, DType.BFLOAT16: 2, DType.FLOAT16: 2, DType.FLOAT64: 8}
"""Of the formats whose elements stand by themselves; those of int8 come in blocks."""

_ALIGNMENT = 64
_HEADER_TAG, _PAYLOAD_TAG, _PADDING_TAG = b"\x0a", b"\x12", b"\x7a"
_VARINT_BYTES_MAX = 10

Leading = Begin | Acknowledge | Record | UploadBegin


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A frame that has arrived: a leading message, or runs with their elements."""

    leading: Leading | None
    runs: tuple[Run, ...]
    payload: memoryview

    def pieces(self) -> Iterator[tuple[Run, memoryview]]:
        """Each run with its part of the payload, not copied."""
        offset = 0
        for run in self.runs:
            end = offset + payload_bytes(run.dtype, run.count)
            yield run, self.payload[offset:end]
            offset = end


def payload_bytes(dtype: DType, count: int) -> int:
    """Bytes of so many elements on the wire; those of int8 begin where a block does."""
    return blocks.bytes_of(count) if dtype is DType.INT8 else count * ITEM_BYTES[dtype]


# --- writing -------------------------------------------------------------------------------------


def leading_frame(message: Leading) -> bytes:
    """The frame that carries `message` and no elements."""
    header = shard_pb2.Header()
    getattr(header, _FIELDS[type(message)]).CopyFrom(codec.to_proto(message))
    encoded = header.SerializeToString()
    if len(encoded) > HEADER_BYTES_MAX:
        raise InvalidFrame(
            f"a {type(message).__name__} of {len(encoded)} bytes is over the limit of "
            f"{HEADER_BYTES_MAX}",
            remedy="Train fewer parameters in one job.",
        )
    return _HEADER_TAG + _varint(len(encoded)) + encoded


def data_frame(
    runs: Sequence[Run],
    parts: Sequence[memoryview],
    checksums: RunningChecksums | None = None,
) -> bytes:
    """The frame that carries the elements of `runs`.

    Args:
        runs: what the elements are.
        parts: their bytes in order; with `checksums` one for each run.
        checksums: of the stream that the frame is part of; None to write those of `runs`.
    """
    header = shard_pb2.Header()
    for place, run in enumerate(runs):
        header.runs.add(
            slice=run.slice,
            start=run.start,
            count=run.count,
            dtype=int(run.dtype),
            content=int(run.content),
            checksum=checksums.after(run, parts[place]) if checksums else run.checksum,
        )
    encoded = header.SerializeToString()
    payload_bytes = sum(part.nbytes for part in parts)
    tail = _PAYLOAD_TAG + _varint(payload_bytes)
    padding = _padding(len(encoded), len(tail))
    head = _HEADER_TAG + _varint(len(encoded) + len(padding)) + encoded + padding
    return b"".join((head, tail, *parts))


def _padding(header_bytes: int, tail_bytes: int) -> bytes:
    """A padding field that ends the prefix of a frame at a multiple of 64."""
    for length_bytes in range(1, 6):
        zeros = -(1 + length_bytes + header_bytes + 2 + tail_bytes) % _ALIGNMENT
        if len(_varint(header_bytes + 2 + zeros)) == length_bytes:
            return _PADDING_TAG + bytes([zeros]) + bytes(zeros)
    raise AssertionError("a header has a length")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


@dataclass(frozen=True, slots=True)
class Extent:
    """What is cut into runs: elements of a slice or of its state.

    Attributes:
        slice: the slice.
        count: how many elements; with none it becomes one run that has none.
        row: how long a row of the slice is.
        dtype: the format in which they travel.
        content: what of the slice they are.
        start: the first of them; with int8 the first of a block, and all to the slice's end follow.
    """

    slice: int
    count: int
    row: int
    dtype: DType
    content: Content = Content.WEIGHT
    start: int = 0


def cut_runs(extents: Iterable[Extent]) -> Iterator[tuple[Run, ...]]:
    """The runs of each frame that carries the whole of `extents`, in order.

    Small slices share a frame. A large one's frames end where a block of four rows ends, as the
    sums inside a slice are formed over such blocks; a block larger than a frame spans several.
    With int8 they end where one of its blocks ends too, and where only that is to be had, there.
    """
    runs: list[Run] = []
    room = PAYLOAD_BYTES_MAX
    for extent in extents:
        start, stop = extent.start, extent.start + extent.count
        whole = False
        while not whole:
            count = _fitting(extent, start, room, fresh=not runs)
            if count or not extent.count:
                runs.append(_run(extent, start, count))
                start, room = start + count, room - payload_bytes(extent.dtype, count)
            whole = start == stop
            if not whole or len(runs) == RUNS_MAX:
                yield tuple(runs)
                runs, room = [], PAYLOAD_BYTES_MAX
    if runs:
        yield tuple(runs)


def _run(extent: Extent, start: int, count: int) -> Run:
    return Run(
        slice=extent.slice,
        start=start,
        count=count,
        dtype=extent.dtype,
        content=extent.content,
    )


def _fitting(extent: Extent, start: int, room: int, *, fresh: bool) -> int:
    """How many elements from `start` fit into `room` bytes and end at a border."""
    rest = extent.start + extent.count - start
    if payload_bytes(extent.dtype, rest) <= room:
        return rest
    border = 4 * extent.row
    if extent.dtype is DType.INT8:
        fitting = room // blocks.BLOCK_BYTES * blocks.BLOCK_ELEMENTS
        border = math.lcm(border, blocks.BLOCK_ELEMENTS)
    else:
        fitting = room // ITEM_BYTES[extent.dtype]
    whole = (start + fitting) // border * border - start
    if whole > 0:
        return whole
    return fitting if fresh else 0


# --- reading -------------------------------------------------------------------------------------


def read_frame(data: bytes) -> Frame:
    """The frame in `data`; its payload is a view of it.

    Raises:
        InvalidFrame: it is malformed, truncated, over a limit, or its runs do not match its
            payload. Nothing else is ever raised.
    """
    if len(data) > FRAME_BYTES_MAX:
        raise InvalidFrame(f"a frame of {len(data)} bytes is over the limit of {FRAME_BYTES_MAX}")
    fields = dict[int, memoryview]()
    view, offset = memoryview(data), 0
    while offset < len(data):
        number, field, offset = _read_field(view, offset)
        if number in fields:
            raise InvalidFrame(f"field {number} of a frame stands in it twice")
        fields[number] = field
    leading, runs = _read_header(fields.get(1, memoryview(b"")))
    payload = fields.get(2, memoryview(b""))
    _check(leading, runs, payload)
    return Frame(leading=leading, runs=runs, payload=payload)


def _read_field(view: memoryview, offset: int) -> tuple[int, memoryview, int]:
    """Number and bytes of the length-delimited field at `offset`, and where the next begins."""
    tag, offset = _read_varint(view, offset)
    if tag & 7 != 2:
        raise InvalidFrame(f"a frame has only length-delimited fields, not wire type {tag & 7}")
    length, offset = _read_varint(view, offset)
    if length > len(view) - offset:
        raise InvalidFrame(f"a frame ends {length - len(view) + offset} bytes too early")
    return tag >> 3, view[offset : offset + length], offset + length


def _read_varint(view: memoryview, offset: int) -> tuple[int, int]:
    value = 0
    for index in range(_VARINT_BYTES_MAX):
        if offset + index >= len(view):
            raise InvalidFrame("a frame ends inside a number")
        byte = view[offset + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, offset + index + 1
    raise InvalidFrame("a number in a frame is longer than ten bytes")


def _read_header(encoded: memoryview) -> tuple[Leading | None, tuple[Run, ...]]:
    if len(encoded) > HEADER_BYTES_MAX:
        raise InvalidFrame(f"a header of {len(encoded)} bytes is over {HEADER_BYTES_MAX}")
    try:
        header = shard_pb2.Header.FromString(bytes(encoded))
        kind = header.WhichOneof("kind")
        leading = codec.from_proto(getattr(header, kind)) if kind else None
        if len(header.runs) > RUNS_MAX:
            raise InvalidFrame(f"a frame has {len(header.runs)} runs; {RUNS_MAX} are allowed")
        runs = tuple(
            Run(
                slice=run.slice,
                start=run.start,
                count=run.count,
                dtype=DType(run.dtype),
                content=Content(run.content),
                checksum=run.checksum,
            )
            for run in header.runs
        )
    except (DecodeError, InvalidRequest, ValueError) as error:
        raise InvalidFrame(f"the header of a frame cannot be read: {error}") from error
    return leading, runs


def _check(leading: Leading | None, runs: tuple[Run, ...], payload: memoryview) -> None:
    if (leading is None) == (not runs):
        raise InvalidFrame("a frame has a leading message or runs, and not both")
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise InvalidFrame(f"a payload of {len(payload)} bytes is over {PAYLOAD_BYTES_MAX}")
    expected = 0
    for run in runs:
        if run.slice < 0 or run.start < 0 or run.count < 0 or not _readable(run):
            raise InvalidFrame(f"a run is not possible: {run}")
        expected += payload_bytes(run.dtype, run.count)
    if expected != len(payload):
        raise InvalidFrame(f"runs of {expected} bytes came with a payload of {len(payload)}")


def _readable(run: Run) -> bool:
    if run.dtype is DType.INT8:
        return run.content is Content.WEIGHT and run.start % blocks.BLOCK_ELEMENTS == 0
    return run.dtype in ITEM_BYTES and run.content is not Content.UNSPECIFIED


_FIELDS: dict[type[Leading], str] = {
    Begin: "begin",
    Acknowledge: "acknowledge",
    Record: "record",
    UploadBegin: "upload",
}
