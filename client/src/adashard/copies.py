"""A worker's copies of the slices of its job: enough to rebuild what a dead shard has held.

After every step a worker has the weights of all slices in its parameters anyway. A copy is what it
takes beside them: the optimizer state (the slice's *capsule*), the checksum of the weights, and,
where the parameter holds them rounded and exact ones are to be kept, the float32 *master*. A copy
is replaced as one, when all of the next has come and every checksum was right; the version belongs
to it and is in `worker.py`, which decides.

Weights are in the hands of the user's code, which may change them at any time. So their checksum
is formed again before they are sent to a shard, and the one that was received goes with them: a
change in the middle is noticed there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adashard.arrivals import Arrival, Part, Piece
from adashard.routing import Routing
from adashard.state import MOMENTS, State, part_of, state_parts
from adashard.wire.checksums import RunningChecksums, extended
from adashard.wire.frames import Extent, cut_runs, data_frame
from adashard.wire.messages import Content, Run
from adashard.wire.placement import Slice
from adashard.wire.spec import DType, JobSpec, Recovery
from adashard.wire.tensors import as_buffer, flat_on_cpu, from_buffer, torch_dtype, wire_dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Copy:
    """What a worker holds of a slice beside its weights and their version. Tensors are on the CPU.

    Attributes:
        dtype: the format in which weights, or the master, are sent on.
        checksum: of them in this format; None for weights of the worker's own, until it has been
            formed for the first time.
        capsule: the optimizer state, float32, in the order in which it travels; None for that of a
            slice that has not been stepped.
        master: the weights in float32, where the parameter does not hold them exactly.
        rounded: the checksum of the weights in the parameter beside a master.
        exact: whether a shard gets back the weights that a shard has had.
    """

    dtype: DType
    checksum: int | None = None
    capsule: Mapping[Content, Tensor] | None = None
    master: Tensor | None = None
    rounded: int | None = None
    exact: bool = True


class Copies:
    """The copies of one worker. Not thread-safe; the session's lock covers every write.

    Args:
        spec: the job, as its entry has it.
        routing: its parameters, by slice; copies are written into them.
    """

    def __init__(self, spec: JobSpec, routing: Routing) -> None:
        self.spec, self._routing = spec, routing
        self._held: dict[int, Copy] = {}
        self.with_state = spec.recovery is Recovery.WORKERS
        """Whether replies bring capsules. Where they do not, copies are of the first version."""

    def parts(self, index: int) -> dict[Content, Part]:
        """What a reply brings of a slice.

        Raises:
            InvalidFrame: there is no such slice.
        """
        piece, wanted = self._routing.piece(index), self._routing.replies.wanted
        dtype = wire_dtype(wanted(self._routing.parameter(index)))
        state = state_parts(self.spec, piece) if self.with_state else {}
        return {Content.WEIGHT: Part(dtype, piece.element_count), **state}

    def begin(self, loaded: State | None) -> None:
        """Makes the worker's own weights, and the state that it has loaded, the first copies."""
        for index, piece in enumerate(self._routing.slices):
            copy = Copy(dtype=wire_dtype(self._routing.parameter(index).dtype))
            if loaded is not None:
                copy = replace(copy, capsule=_capsule_of(loaded, piece))
                whole = loaded.masters.get(piece.parameter)
                if whole is not None:
                    master = part_of(whole, piece, Content.WEIGHT)
                    copy = replace(copy, dtype=DType.FLOAT32, master=master)
            self._held[index] = copy

    def put(self, arrival: Arrival) -> bool:
        """Takes a slice that has come whole, and writes its weights into their parameter, in place.

        Returns:
            Whether the weights were there before, bit for bit.
        """
        index, weights = arrival.slice, arrival.pieces[Content.WEIGHT]
        same = self._routing.write(index, weights.buffers, weights.dtype)
        copy = self._copy_of(index, weights)
        if self.with_state:
            kinds = [content for content in MOMENTS if content in arrival.pieces]
            copy = replace(copy, capsule={one: _joined(arrival.pieces[one]) for one in kinds})
        self._held[index] = copy
        return same

    def intact(self, index: int) -> bool:
        """Whether the weights of a slice are still those that came, or that it began with.

        The first time that own weights are asked for is when they become what it began with.
        """
        copy = self._held[index]
        checksum = extended(0, as_buffer(_weights(self._routing, index, copy)))
        rounded = None if copy.master is None else self._checksum(index)
        if copy.checksum is None:
            self._held[index] = replace(copy, checksum=checksum, rounded=rounded)
            return True
        return (checksum, rounded) == (copy.checksum, copy.rounded)

    def exact(self, index: int) -> bool:
        """Whether a shard gets back from this copy the weights that a shard has had."""
        return self._held[index].exact

    def name(self, index: int) -> str:
        """The parameter that a slice belongs to."""
        return self.spec.parameters[self._routing.piece(index).parameter].name

    def stepped(self, index: int) -> bool:
        """Whether there is optimizer state in the copy of a slice."""
        return self._held[index].capsule is not None

    def frames(self, indices: Sequence[int]) -> Iterator[bytes]:
        """The frames that carry copies as they are now: of each the weights, then the capsule.

        Args:
            indices: slices, in the order in which they are sent.
        """
        outgoing = _Outgoing(self._routing, {index: self._held[index] for index in indices})
        extents = (extent for index in indices for extent in outgoing.extents(index))
        for runs in cut_runs(extents):
            taken = [outgoing.take(run) for run in runs]
            yield data_frame([run for run, _ in taken], [buffer for _, buffer in taken])

    def _copy_of(self, index: int, weights: Piece) -> Copy:
        """The copy that begins with weights that have just been written into their parameter."""
        parameter = self._routing.parameter(index)
        exact = weights.dtype in (DType.FLOAT32, DType.FLOAT64)
        if self._routing.replies.keeps_master(parameter):
            rounded, master = self._checksum(index), _joined(weights)
            copy = Copy(dtype=weights.dtype, checksum=weights.checksum)
            return replace(copy, master=master, rounded=rounded)
        if torch.promote_types(parameter.dtype, torch_dtype(weights.dtype)) == parameter.dtype:
            return Copy(dtype=weights.dtype, checksum=weights.checksum, exact=exact)
        dtype = wire_dtype(parameter.dtype)  # they were rounded, and these are what is left
        return Copy(dtype=dtype, checksum=self._checksum(index), exact=False)

    def _checksum(self, index: int) -> int:
        """That of the weights in the parameter, in its format."""
        return extended(0, as_buffer(flat_on_cpu(self._routing.view(index))))


class _Outgoing:
    """Copies on their way out; one tensor at a time is flattened."""

    def __init__(self, routing: Routing, copies: Mapping[int, Copy]) -> None:
        self._routing, self._copies = routing, copies
        self._checksums = RunningChecksums()
        self._flat: tuple[int, Content, Tensor] | None = None

    def extents(self, index: int) -> Iterator[Extent]:
        copy, piece = self._copies[index], self._routing.piece(index)
        row = piece.shape[-1] if piece.shape else 1
        yield Extent(index, piece.element_count, row, copy.dtype)
        for content, tensor in (copy.capsule or {}).items():
            yield Extent(index, tensor.numel(), 1, DType.FLOAT32, content)

    def take(self, run: Run) -> tuple[Run, memoryview]:
        """A run with its checksum, and its elements.

        The last of the weights' has the one that they came with, whatever they are now.
        """
        flat, stop = self._tensor(run.slice, run.content), run.start + run.count
        buffer, known = as_buffer(flat[run.start : stop]), self._copies[run.slice].checksum
        checksum = self._checksums.after(run, buffer)
        if run.content is Content.WEIGHT and stop == flat.numel() and known is not None:
            checksum = known
        return replace(run, checksum=checksum), buffer

    def _tensor(self, index: int, content: Content) -> Tensor:
        if self._flat is None or self._flat[:2] != (index, content):
            copy = self._copies[index]
            if content is Content.WEIGHT:
                flat = _weights(self._routing, index, copy)
            else:
                assert copy.capsule is not None
                flat = flat_on_cpu(copy.capsule[content])
            self._flat = (index, content, flat)
        return self._flat[2]


def _capsule_of(state: State, piece: Slice) -> dict[Content, Tensor]:
    """What a slice has of a state; views."""
    moments = state.moments[piece.parameter]
    found = [content for content in MOMENTS if content in moments]
    return {content: part_of(moments[content], piece, content) for content in found}


def _weights(routing: Routing, index: int, copy: Copy) -> Tensor:
    """The weights of a copy: flat, on the CPU, in the format in which they travel."""
    weights = routing.view(index) if copy.master is None else copy.master
    return flat_on_cpu(weights).to(torch_dtype(copy.dtype))


def _joined(piece: Piece) -> Tensor:
    """The elements of a tensor that has come, flat, in memory of their own."""
    return torch.cat([from_buffer(buffer, piece.dtype) for buffer in piece.buffers])
