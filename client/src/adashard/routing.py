"""Cuts a model's tensors along the placement, and puts what comes back into them.

A slice is the part of a tensor between two indices of one axis. Where it lies in one piece it is a
view: a gradient goes out from where autograd left it, and weights are written in place as frames
arrive. Where it does not, as when columns are cut, it is copied once; a stream holds the copy of
one slice at a time, beside what is in the frame at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from adashard.rows import is_sparse, row_extents, values_within
from adashard.wire.errors import InvalidFrame
from adashard.wire.frames import Extent, cut_runs, data_frame
from adashard.wire.messages import Content, Entry, Member, Run
from adashard.wire.placement import Slice, cut
from adashard.wire.spec import DType, JobSpec
from adashard.wire.tensors import as_buffer, flat_on_cpu, flat_view, from_buffer, wire_dtype


class Routing:
    """The parameters of one model, by slice. Not thread-safe; the session's lock covers writes.

    Args:
        spec: the job.
        parameters: its tensors, in the order of `spec.parameters`; written in place.
        reply_dtype: the format in which weights are wanted; None for that of each parameter.
    """

    def __init__(
        self,
        spec: JobSpec,
        parameters: Sequence[Tensor],
        *,
        reply_dtype: torch.dtype | None = None,
    ) -> None:
        self.slices: tuple[Slice, ...] = cut(spec)
        self._parameters = tuple(parameters)
        self._reply_dtype = reply_dtype
        self._staged: dict[int, Tensor] = {}

    def dtypes(self) -> tuple[DType, ...]:
        """The formats in which weights are wanted: one for all parameters, or one each."""
        each = tuple(self._wanted(parameter) for parameter in self._parameters)
        return each[:1] if len(set(each)) <= 1 else each

    def by_shard(self, entry: Entry) -> dict[Member, list[int]]:
        """The slices of each shard that has any, ascending."""
        found: dict[Member, list[int]] = {}
        for index, owner in enumerate(entry.placement):
            found.setdefault(entry.shards[owner], []).append(index)
        return found

    def gradient_frames(
        self, gradients: Mapping[int, Tensor], indices: Iterable[int]
    ) -> Iterator[bytes]:
        """The frames that carry the gradients of `indices`, where there are any.

        Args:
            gradients: by parameter; any of the formats that travel, on any device; dense, or
                row-sparse as `rows.coalesced_rows` returns them.
            indices: slices, in the order in which they are sent; none of them twice.
        """
        return self._frames(gradients, [i for i in indices if self._owner(i) in gradients])

    def weight_frames(self, indices: Iterable[int]) -> Iterator[bytes]:
        """The frames that carry the weights of `indices` as they stand, in their own format."""
        return self._frames(dict(enumerate(self._parameters)), list(indices))

    def write(self, run: Run, buffer: memoryview) -> bool:
        """Writes elements that have arrived into their parameter, in place.

        They are rounded to nearest where the parameter's format is narrower than the one wanted.
        A slice that lies in rows takes whole rows as they come; where it does not, or a run ends
        inside one, its elements wait for the last.

        Args:
            run: where they belong; the runs of a slice come in order.
            buffer: their bytes.

        Returns:
            Whether they were there before, bit for bit.

        Raises:
            InvalidFrame: the run does not fit its slice, or is not what was wanted.
        """
        parameter = self._parameters[self._owner(run.slice)]
        self._check(run, parameter)
        target = self._target(run, parameter)
        fresh = from_buffer(buffer, run.dtype).to(target.device).to(target.dtype).view(target.shape)
        bits = _BITS[target.element_size()]  # -0 is not 0, and NaN is itself
        same = torch.equal(target.view(bits), fresh.view(bits))
        target.copy_(fresh)
        self._unstage(run, parameter)
        return same

    def _frames(self, tensors: Mapping[int, Tensor], indices: Sequence[int]) -> Iterator[bytes]:
        outgoing = _Outgoing(self.slices, tensors)
        extents = (extent for index in indices for extent in outgoing.extents(index))
        for runs in cut_runs(extents):
            by_slice = itertools.groupby(runs, lambda run: run.slice)
            counts = [(index, sum(run.count for run in its_runs)) for index, its_runs in by_slice]
            yield data_frame(runs, [outgoing.take(index, count) for index, count in counts])

    def _check(self, run: Run, parameter: Tensor) -> None:
        if run.content is not Content.WEIGHT:
            raise InvalidFrame(f"a parameter takes weights, not so: {run}")
        if run.start + run.count > self.slices[run.slice].element_count:
            raise InvalidFrame(f"a reply reaches beyond slice {run.slice}: {run}")
        wanted = self._wanted(parameter)
        if run.dtype is not wanted:
            raise InvalidFrame(f"a reply came as {run.dtype.name}, and {wanted.name} was wanted")

    def _target(self, run: Run, parameter: Tensor) -> Tensor:
        """Where the elements of a run are written: the slice itself, or a staging copy.

        A slice that begins anew is staged anew: of one that was broken off nothing is left.
        """
        view, stop = _view(parameter, self.slices[run.slice]), run.start + run.count
        if run.start == 0:
            self._staged.pop(run.slice, None)
        if run.slice not in self._staged:
            there = _elements(view, run.start, stop)
            if there is not None:
                return there
            self._staged[run.slice] = flat_view(view.contiguous())
        return self._staged[run.slice][run.start : stop]

    def _unstage(self, run: Run, parameter: Tensor) -> None:
        piece = self.slices[run.slice]
        if run.start + run.count == piece.element_count:
            staged = self._staged.pop(run.slice, None)
            if staged is not None:
                _view(parameter, piece).copy_(staged.view(piece.shape))

    def _wanted(self, parameter: Tensor) -> DType:
        return wire_dtype(parameter.dtype if self._reply_dtype is None else self._reply_dtype)

    def _owner(self, index: int) -> int:
        if not 0 <= index < len(self.slices):
            raise InvalidFrame(f"there is no slice {index}; the job has {len(self.slices)}")
        return self.slices[index].parameter


class _Outgoing:
    """Slices on their way out: what of each travels, and its elements from first to last."""

    def __init__(self, slices: Sequence[Slice], tensors: Mapping[int, Tensor]) -> None:
        self._slices, self._tensors = slices, tensors
        self._slice = -1
        self._part = _NOTHING
        self._copy: Tensor | None = None
        self._taken = 0

    def extents(self, index: int) -> Iterator[Extent]:
        piece = self._slices[index]
        tensor = self._tensors[piece.parameter]
        if is_sparse(tensor):
            yield from row_extents(tensor, piece)
        else:
            row = piece.shape[-1] if piece.shape else 1
            yield Extent(index, piece.element_count, row, wire_dtype(tensor.dtype))

    def take(self, index: int, count: int) -> memoryview:
        """The next elements of a slice."""
        if index != self._slice:
            self._begin(index)
        first, self._taken = self._taken, self._taken + count
        there = _elements(self._part, first, self._taken)
        if there is not None:
            return as_buffer(flat_on_cpu(there))
        if self._copy is None:
            self._copy = flat_on_cpu(self._part)
        elements = as_buffer(self._copy[first : self._taken])
        if 0 < first < self._taken == self._copy.numel():
            return memoryview(bytes(elements))  # the frame goes on, and the slice's copy may go
        return elements

    def _begin(self, index: int) -> None:
        piece = self._slices[index]
        tensor = self._tensors[piece.parameter]
        self._copy = None  # of the slice before
        self._part = values_within(tensor, piece) if is_sparse(tensor) else _view(tensor, piece)
        self._slice, self._taken = index, 0


_NOTHING = torch.empty(0)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _view(tensor: Tensor, piece: Slice) -> Tensor:
    """The part of a tensor that a slice is, in its shape."""
    whole = tensor.detach()
    return whole.narrow(piece.axis, piece.start, piece.stop - piece.start) if piece.shape else whole


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


def _in_rows(part: Tensor) -> bool:
    """Whether all rows of a tensor lie one behind the other at one distance."""
    shape, strides = part.shape, part.stride()
    return all(strides[at] == shape[at + 1] * strides[at + 1] for at in range(part.dim() - 2))
