"""Slices on their way to a worker: gathered until they are whole, and only then used.

A slice comes as its weights from first to last and then, where they are asked for, the tensors of
its optimizer state. What comes are views of the frames; nothing is copied, and nothing that the
worker holds is touched before all has come and every checksum was right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from adashard.wire.checksums import extended
from adashard.wire.errors import DamagedFrame, InvalidFrame
from adashard.wire.messages import Content, Run
from adashard.wire.spec import DType


class Part(NamedTuple):
    """What is expected of one tensor of a slice: the format and the number of its elements."""

    dtype: DType
    element_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One tensor of a slice, whole: its bytes in order, their format, and their checksum."""

    dtype: DType
    buffers: Sequence[memoryview]
    checksum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A slice that has come whole, weights first; one without pieces is said to be unchanged."""

    slice: int
    pieces: Mapping[Content, Piece] = field(default_factory=dict)


@dataclass(slots=True)
class _Coming:
    """A tensor of which the first elements have come."""

    buffers: list[memoryview] = field(default_factory=list)
    count: int = 0
    checksum: int = 0


class Arrivals:
    """The slices of one stream, one after the other. Not thread-safe: each stream has its own.

    It holds one slice at a time. Weights from element 0 on begin a slice anew, as where a stream
    that was broken off is repeated, and whatever was not whole is forgotten.

    Args:
        parts: what a slice consists of; raises `InvalidFrame` where there is no such slice.
    """

    def __init__(self, parts: Callable[[int], Mapping[Content, Part]]) -> None:
        self._parts = parts
        self._slice = -1
        self._coming: dict[Content, _Coming] = {}

    def take(self, run: Run, buffer: memoryview) -> Arrival | None:
        """Takes the next run of the stream; the slice, if it is whole now.

        Args:
            run: what has come; without elements it says that its slice is unchanged.
            buffer: the bytes of its elements; kept until the slice is whole.

        Raises:
            InvalidFrame: it is not what comes next.
            DamagedFrame: what has come of the tensor is not what was sent; the slice is forgotten.
        """
        parts = self._parts(run.slice)
        if run.count == 0:
            return Arrival(slice=run.slice)
        if run.content is Content.WEIGHT and run.start == 0:
            self._slice, self._coming = run.slice, {}
        self._check(run, parts)
        self._add(run, buffer)
        if any(self._came(content) != part.element_count for content, part in parts.items()):
            return None
        coming, self._slice, self._coming = self._coming, -1, {}
        pieces = {
            content: Piece(dtype=parts[content].dtype, buffers=one.buffers, checksum=one.checksum)
            for content, one in coming.items()
        }
        return Arrival(slice=run.slice, pieces=pieces)

    def _check(self, run: Run, parts: Mapping[Content, Part]) -> None:
        part, came = parts.get(run.content), self._came(run.content)
        if part is None:
            raise InvalidFrame(f"slice {run.slice} has no {run.content.name.lower()} here: {run}")
        if run.dtype is not part.dtype:
            raise InvalidFrame(
                f"slice {run.slice} came as {run.dtype.name}, and {part.dtype.name} was wanted"
            )
        if (
            run.slice != self._slice
            or run.start != came
            or run.start + run.count > part.element_count
        ):
            raise InvalidFrame(
                f"slice {self._slice} goes on at element {came} of {part.element_count}, "
                f"not so: {run}"
            )

    def _add(self, run: Run, buffer: memoryview) -> None:
        coming = self._coming.setdefault(run.content, _Coming())
        coming.checksum = extended(coming.checksum, buffer)
        coming.count += run.count
        coming.buffers.append(buffer)
        if coming.checksum != run.checksum:
            self._slice, self._coming = -1, {}
            raise DamagedFrame(
                f"elements up to {run.start + run.count} of slice {run.slice} came damaged: their "
                f"checksum is {coming.checksum:08x}, and {run.checksum:08x} was sent with them",
                slice=run.slice,
            )

    def _came(self, content: Content) -> int:
        coming = self._coming.get(content)
        return coming.count if coming else 0
