"""Cuts a model's tensors along the placement, and puts what comes back into them.

A slice is the part of a tensor between two indices of one axis. Where it lies in one piece it is a
view: a gradient goes out from where autograd left it, and weights are written in place from the
frames that have brought them. Where it does not, as when columns are cut, it is copied once; a
stream holds the copy of one slice at a time, beside what is in the frame at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from adashard.address import is_loopback
from adashard.encoding import Encoding, encoded
from adashard.feedback import part_of
from adashard.push import Replies
from adashard.rows import is_sparse, row_extents
from adashard.wire.blocks import BLOCK_ELEMENTS
from adashard.wire.errors import InvalidFrame
from adashard.wire.frames import Extent, cut_runs, data_frame
from adashard.wire.messages import Entry, Member
from adashard.wire.placement import Slice, cut
from adashard.wire.spec import DType, JobSpec
from adashard.wire.tensors import (
    as_buffer,
    flat_on_cpu,
    flat_view,
    from_buffer,
    row_by_row,
    wire_dtype,
)


class Routing:
    """The parameters of one model, by slice. Not thread-safe; the session's lock covers writes.

    Args:
        spec: the job.
        parameters: its tensors, in the order of `spec.parameters`; written in place.
        replies: how weights are wanted; None for in the format of each parameter.
    """

    def __init__(
        self,
        spec: JobSpec,
        parameters: Sequence[Tensor],
        *,
        replies: Replies | None = None,
    ) -> None:
        self.slices: tuple[Slice, ...] = cut(spec)
        self.parameters = tuple(parameters)
        self.replies = replies or Replies()
        self._shards_here = False  # whether all of them are on this machine

    def dtypes(self) -> tuple[DType, ...]:
        """The formats in which weights are wanted: one for all parameters, or one each."""
        each = tuple(wire_dtype(self.replies.wanted(one)) for one in self.parameters)
        return each[:1] if len(set(each)) <= 1 else each

    def by_shard(self, entry: Entry) -> dict[Member, list[int]]:
        """The slices of each shard that has any, ascending."""
        found: dict[Member, list[int]] = {}
        for index, owner in enumerate(entry.placement):
            found.setdefault(entry.shards[owner], []).append(index)
        self._shards_here = all(is_loopback(member.address) for member in found)
        return found

    def parameter(self, index: int) -> Tensor:
        """The parameter of a slice.

        Raises:
            InvalidFrame: there is no such slice.
        """
        return self.parameters[self.piece(index).parameter]

    def piece(self, index: int) -> Slice:
        """Where in its parameter a slice is.

        Raises:
            InvalidFrame: there is no such slice.
        """
        if not 0 <= index < len(self.slices):
            raise InvalidFrame(f"there is no slice {index}; the job has {len(self.slices)}")
        return self.slices[index]

    def gradient_frames(
        self,
        gradients: Mapping[int, Tensor],
        indices: Iterable[int],
        starts: Mapping[int, int] | None = None,
        *,
        encoding: Encoding | None = None,
    ) -> Iterator[bytes]:
        """The frames that carry the gradients of `indices`, where there are any.

        Args:
            gradients: by parameter; any of the formats that travel, on any device; dense, or
                row-sparse as `rows.coalesced_rows` returns them.
            indices: slices, in the order in which they are sent; none of them twice.
            starts: by slice, how many of its elements need not be sent. What makes no sense, and
                what would end inside sparse rows or a block of int8, counts for nothing.
            encoding: of the push, the same for each of its streams; None to send gradients in
                the format that they are in.
        """
        encoding = encoding or Encoding()
        meter = encoding.meter
        if meter is not None:
            meter.began(here=self._shards_here)
        outgoing = _Outgoing(self.slices, gradients, starts or {}, encoding)
        wanted = [index for index in indices if self.piece(index).parameter in gradients]
        extents = (extent for index in wanted for extent in outgoing.extents(index))
        for runs in cut_runs(extents):
            by_slice = itertools.groupby(runs, lambda run: run.slice)
            counts = [(index, sum(run.count for run in its_runs)) for index, its_runs in by_slice]
            frame = data_frame(runs, [outgoing.take(index, count) for index, count in counts])
            yield frame
            if meter is not None:
                meter.accepted(len(frame))

    def view(self, index: int) -> Tensor:
        """The weights of a slice as they stand, in its shape; a view of the parameter."""
        return part_of(self.parameter(index), self.slices[index])

    def write(self, index: int, buffers: Sequence[memoryview], dtype: DType) -> bool:
        """Writes a whole slice into its parameter, in place.

        Weights are rounded to nearest where the parameter's format is narrower, or where they were
        to be and have come whole for the sake of a master.

        Args:
            index: the slice.
            buffers: the bytes of its elements, in order.
            dtype: their format.

        Returns:
            Whether they were there before, bit for bit.
        """
        view = self.view(index)
        parts = [from_buffer(buffer, dtype) for buffer in buffers]
        borders = list(itertools.accumulate([part.numel() for part in parts], initial=0))
        targets = [_elements(view, *between) for between in itertools.pairwise(borders)]
        if any(target is None for target in targets):  # a run ends inside a row that is cut
            parts, targets = [torch.cat(parts)], [view]
        through = self.replies.rounded_to(self.parameter(index))
        same = True
        for target, part in zip(targets, parts, strict=True):
            assert target is not None
            same &= _write(target, part, through)
        return same


class _Outgoing:
    """Slices on their way out: what of each travels, and its elements from first to last."""

    def __init__(
        self,
        slices: Sequence[Slice],
        tensors: Mapping[int, Tensor],
        starts: Mapping[int, int],
        encoding: Encoding,
    ) -> None:
        self._slices, self._tensors, self._starts = slices, tensors, starts
        self._encoding = encoding
        self._slice = -1
        self._part = _NOTHING
        self._dtype: DType | None = None  # None for that of the part
        self._copy: Tensor | None = None
        self._taken = 0

    def extents(self, index: int) -> Iterator[Extent]:
        piece = self._slices[index]
        tensor, start = self._tensors[piece.parameter], self._start(index)
        if start == piece.element_count:
            return
        dtype = self._encoding.dtype_of(tensor)
        if is_sparse(tensor):
            yield from row_extents(tensor, piece, dtype)
        else:
            row, count = piece.shape[-1] if piece.shape else 1, piece.element_count - start
            yield Extent(index, count, row, dtype, start=start)

    def take(self, index: int, count: int) -> memoryview:
        """The next elements of a slice."""
        if index != self._slice:
            self._begin(index)
        first, self._taken = self._taken, self._taken + count
        there = _elements(self._part, first, self._taken)
        if self._dtype is not None:
            if there is None:
                there = self._copied()[first : self._taken]
            return as_buffer(flat_on_cpu(encoded(there, self._dtype)))
        if there is not None:
            return row_by_row(there)
        elements = as_buffer(self._copied()[first : self._taken])
        if 0 < first < self._taken == self._copied().numel():
            return memoryview(bytes(elements))  # the frame goes on, and the slice's copy may go
        return elements

    def _begin(self, index: int) -> None:
        piece = self._slices[index]
        tensor = self._tensors[piece.parameter]
        self._copy = None  # of the slice before
        self._part = self._encoding.part(tensor, piece)
        dtype = self._encoding.dtype_of(tensor)
        self._dtype = None if dtype is wire_dtype(tensor.dtype) else dtype
        self._slice, self._taken = index, self._start(index)

    def _copied(self) -> Tensor:
        """The slice's elements in one piece, where they cannot be viewed so; made once."""
        if self._copy is None:
            self._copy = flat_on_cpu(self._part)
        return self._copy

    def _start(self, index: int) -> int:
        """The first element that is sent."""
        piece, start = self._slices[index], self._starts.get(index, 0)
        if start == piece.element_count:
            return start
        tensor = self._tensors[piece.parameter]
        inside = is_sparse(tensor) or (
            self._encoding.dtype_of(tensor) is DType.INT8 and start % BLOCK_ELEMENTS != 0
        )
        return 0 if inside or not 0 <= start < piece.element_count else start


_NOTHING = torch.empty(0)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _elements(part: Tensor, start: int, stop: int) -> Tensor | None:
    """Elements `start` to `stop` of a slice, counted row by row, where they can be viewed.

    They can if the slice lies in one piece, and then the view is flat; or if it lies in rows and
    they are whole ones, as with slices that are cut between columns. None otherwise.
    """
    if part.is_contiguous():
        return flat_view(part)[start:stop]
    width = part.shape[-1]
    if start % width or stop % width or part.stride(-1) != 1 or not _in_rows(part):
        return None
    rows = part.as_strided((part.numel() // width, width), (part.stride(-2), 1))
    return rows[start // width : stop // width]


def _write(target: Tensor, part: Tensor, through: torch.dtype | None) -> bool:
    """Writes elements, in place; whether they were there before, bit for bit."""
    fresh = part.to(target.device)
    if through is not None:
        fresh = fresh.to(through)
    fresh = fresh.to(target.dtype).view(target.shape)
    bits = _BITS[target.element_size()]  # -0 is not 0, and NaN is itself
    same = torch.equal(target.view(bits), fresh.view(bits))
    target.copy_(fresh)
    return same


def _in_rows(part: Tensor) -> bool:
    """Whether all rows of a tensor lie one behind the other at one distance."""
    shape, strides = part.shape, part.stride()
    return all(strides[at] == shape[at + 1] * strides[at + 1] for at in range(part.dim() - 2))
