"""The optimizer state of a model: whole tensors on a worker, parts of slices on the way.

A worker holds none of it while it trains. It asks all shards for it when it is to be saved, and
brings it along where a job begins with a state that was loaded.

What a slice has of a moment is cut like the slice. The mean along the axis that is cut has no such
axis: it belongs to the whole parameter, and every slice has it all, with the same bits.
"""

from __future__ import annotations

import hashlib
import logging
import math
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adashard.push import Replies
from adashard.wire.errors import Internal, InvalidFrame, InvalidSettings
from adashard.wire.frames import Extent, Frame, cut_runs, data_frame
from adashard.wire.messages import Content, Outcome, Record, Run
from adashard.wire.placement import Slice, cut, factored_axes
from adashard.wire.spec import AdafactorLayout, DType, JobSpec
from adashard.wire.tensors import as_buffer, flat_on_cpu, from_buffer, wire_dtype

log = logging.getLogger("adashard")

MOMENTS = (Content.ROW, Content.COLUMN, Content.VECTOR, Content.MOMENTUM)
"""What state consists of, in the order in which it travels, after a slice's weights."""

Moments = Mapping[Content, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """A job's optimizer state at one version. Tensors are float32, on the CPU, and whole.

    Attributes:
        version: steps that the job has taken.
        step_counts: each parameter's count of updates.
        moments: of each parameter, in the shapes of `moment_shapes`.
        masters: float32 weights, by parameter, of those that a worker holds in a narrower format.
    """

    version: int
    step_counts: tuple[int, ...]
    moments: tuple[Moments, ...]
    masters: Mapping[int, Tensor]

    def fingerprint(self) -> str:
        """SHA-256 of everything but weights: two states with the same are the same."""
        count = len(self.step_counts)
        digest = hashlib.sha256(struct.pack(f"<{count + 1}q", self.version, *self.step_counts))
        for index, moments in enumerate(self.moments):
            for content in sorted(moments):
                digest.update(struct.pack("<2q", index, content))
                digest.update(as_buffer(flat_on_cpu(moments[content])))
        return digest.hexdigest()

    def record(self) -> Record:
        """Stands for the steps that have led to this state, where a job begins with it.

        Nobody took part in them that this job knows. What the next step needs of them are version
        and step counts.
        """
        return Record(
            step=self.version,
            workers=(),
            shares=(),
            outcome=Outcome.APPLY,
            present=bytes((len(self.step_counts) + 7) // 8),
            step_counts=self.step_counts,
            groups=(),
        )


# --- what a slice has of it ----------------------------------------------------------------------


def moment_shapes(
    shape: tuple[int, ...], layout: AdafactorLayout
) -> dict[Content, tuple[int, ...]]:
    """The moments of a parameter of `shape`: row means have no column axis, and vice versa."""
    return _shapes(shape, factored_axes(shape, layout), layout)


def zero_moments(shape: tuple[int, ...], layout: AdafactorLayout) -> Moments:
    """The moments of a parameter of `shape` that has not been updated."""
    return {
        content: torch.zeros_like(_empty(one))
        for content, one in moment_shapes(shape, layout).items()
    }


def _shapes(
    shape: tuple[int, ...], axes: tuple[int, int] | None, layout: AdafactorLayout
) -> dict[Content, tuple[int, ...]]:
    if axes is None:
        found = {Content.VECTOR: shape}
    else:
        row, column = axes
        found = {Content.ROW: _without(shape, column), Content.COLUMN: _without(shape, row)}
    if layout.momentum:
        found[Content.MOMENTUM] = shape
    return found


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def part_of(whole: Tensor, piece: Slice, content: Content) -> Tensor:
    """What a slice has of one of its parameter's tensors; a view.

    Args:
        whole: the parameter's weights, or one of its moments.
        piece: the slice.
        content: which of them it is.
    """
    averaged = None
    if piece.axes is not None and content in (Content.ROW, Content.COLUMN):
        row, column = piece.axes
        averaged = column if content is Content.ROW else row
    if not piece.shape or averaged == piece.axis:
        return whole
    axis = piece.axis - (averaged is not None and averaged < piece.axis)
    return whole.narrow(axis, piece.start, piece.stop - piece.start)


# --- where a job begins with it ------------------------------------------------------------------


def fitted(state: State, spec: JobSpec, weights: Sequence[Tensor], replies: Replies) -> State:
    """A loaded state as the worker's job begins with it.

    Parameters that were added after loading have fresh state. A master counts where the weight is
    what it rounds to; where the script has put other weights into the model since, those count.

    Args:
        state: as it was loaded.
        spec: the job as it is now; its first parameters are those of `state`.
        weights: its parameters.
        replies: in which formats they came to the worker.

    Raises:
        InvalidSettings: settings have changed so that the state is of another kind.
    """
    moments = list(state.moments)
    for index, parameter in enumerate(spec.parameters):
        layout = spec.groups[parameter.group].adafactor or AdafactorLayout()
        if index >= len(moments):
            moments.append(zero_moments(parameter.shape, layout))
        elif moments[index].keys() != moment_shapes(parameter.shape, layout).keys():
            raise InvalidSettings(
                f"group {parameter.group} has other settings than when the state of "
                f"{parameter.name!r} was loaded: it is {layout} now",
                remedy="Change it before load_state_dict(), or not at all.",
            )
    masters = {
        index: master
        for index, master in state.masters.items()
        if _rounds_to(master, weights[index], replies.rounded_to(weights[index]))
    }
    for index in sorted(state.masters.keys() - masters.keys()):
        name = spec.parameters[index].name
        log.warning("%r has other weights than its state was saved with; they count", name)
    counts = state.step_counts + (0,) * (len(moments) - len(state.step_counts))
    return replace(state, step_counts=counts, moments=tuple(moments), masters=masters)


def _rounds_to(master: Tensor, weight: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether a weight is one of the two neighbours of its master in `dtype`, everywhere."""
    if dtype is None:
        return False
    held = weight.detach().to("cpu", torch.float32)
    spacing = held.abs().clamp_(min=torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
    return bool(((master - held).abs() <= spacing).all())


# --- on its way to shards ------------------------------------------------------------------------


def state_frames(
    state: State, weights: Sequence[Tensor], slices: Sequence[Slice], indices: Iterable[int]
) -> Iterator[bytes]:
    """The frames that carry slices whole: of each the weights, then the state.

    Args:
        state: its masters go instead of the weights that they are masters of.
        weights: of every parameter, on any device.
        slices: all of the job.
        indices: those that are sent.
    """
    outgoing = _Outgoing(state, weights, slices)
    extents = (extent for index in indices for extent in outgoing.extents(index))
    for runs in cut_runs(extents):
        yield data_frame(runs, [outgoing.take(run) for run in runs])


class _Outgoing:
    """Slices with their state on the way out; one part at a time is flattened."""

    def __init__(self, state: State, weights: Sequence[Tensor], slices: Sequence[Slice]) -> None:
        self._state, self._weights, self._slices = state, weights, slices
        self._flat: tuple[int, Content, Tensor] | None = None

    def extents(self, index: int) -> Iterator[Extent]:
        parameter = self._slices[index].parameter
        moments = self._state.moments[parameter]
        for content in (Content.WEIGHT, *(one for one in MOMENTS if one in moments)):
            part = self._part(index, content)
            row = part.shape[-1] if part.shape else 1
            yield Extent(index, part.numel(), row, wire_dtype(part.dtype), content)

    def take(self, run: Run) -> memoryview:
        """The elements of a run."""
        if self._flat is None or self._flat[:2] != (run.slice, run.content):
            part = self._part(run.slice, run.content)
            self._flat = (run.slice, run.content, flat_on_cpu(part))
        return as_buffer(self._flat[2][run.start : run.start + run.count])

    def _part(self, index: int, content: Content) -> Tensor:
        piece = self._slices[index]
        parameter = piece.parameter
        if content is Content.WEIGHT:
            whole = self._state.masters.get(parameter, self._weights[parameter]).detach()
        else:
            whole = self._state.moments[parameter][content]
        return part_of(whole, piece, content)


# --- on its way from shards ----------------------------------------------------------------------


class Gathering:
    """A job's state as it comes, one copy of it all. Not thread-safe; a lock covers its calls.

    Args:
        spec: the job, as its entry has it.
        version: the version that is asked for.
        masters: parameters whose float32 weights are kept; those of others are passed over.
    """

    def __init__(self, spec: JobSpec, version: int, masters: Collection[int]) -> None:
        self._slices = cut(spec)
        self._version = version
        self._record: Record | None = None
        self._layouts = [group.adafactor or AdafactorLayout() for group in spec.groups]
        self._groups = [parameter.group for parameter in spec.parameters]
        self._whole: list[dict[Content, Tensor]] = []
        for index, parameter in enumerate(spec.parameters):
            shapes = moment_shapes(parameter.shape, self._layouts[parameter.group])
            if index in masters:
                shapes[Content.WEIGHT] = parameter.shape
            self._whole.append({content: _empty(shape) for content, shape in shapes.items()})
        self._came: dict[tuple[int, Content], int] = {}
        self._staged: dict[int, Tensor] = {}

    def has(self, indices: Iterable[int]) -> bool:
        """Whether the slices have come whole."""
        return all(
            self._came.get((index, content), 0) == count
            for index in indices
            for content, count in self._counts(self._slices[index]).items()
        )

    def receive(self, frame: Frame) -> None:
        """Takes the next frame of a shard's answer.

        Raises:
            InvalidFrame: it is not about the version, or does not go on where the last one ended.
            Internal: two shards have different records.
        """
        if isinstance(frame.leading, Record):
            self._take_record(frame.leading)
        for run, buffer in frame.pieces():
            self._take(run, buffer)

    def state(self) -> State:
        """What has come, once all slices have; the tensors are the caller's then."""
        counts = self._record.step_counts if self._record else (0,) * len(self._whole)
        masters = {
            index: tensors.pop(Content.WEIGHT)
            for index, tensors in enumerate(self._whole)
            if Content.WEIGHT in tensors
        }
        return State(
            version=self._version,
            step_counts=counts,
            moments=tuple(self._whole),
            masters=masters,
        )

    def _take_record(self, record: Record) -> None:
        if record.step != self._version:
            raise InvalidFrame(f"the record of step {record.step} came for state {self._version}")
        if self._record not in (None, record):
            raise Internal(f"two shards have different records of step {self._version}")
        self._record = record

    def _take(self, run: Run, buffer: memoryview) -> None:
        if not 0 <= run.slice < len(self._slices):
            raise InvalidFrame(f"there is no slice {run.slice}; the job has {len(self._slices)}")
        piece, key = self._slices[run.slice], (run.slice, run.content)
        count = self._counts(piece).get(run.content)
        came = 0 if run.start == 0 else self._came.get(key, 0)
        stop = run.start + run.count
        if count is None or run.start != came or stop > count or run.dtype is not DType.FLOAT32:
            raise InvalidFrame(f"state goes on at element {came}, in float32, and not so: {run}")
        self._came[key] = stop
        whole = self._whole[piece.parameter].get(run.content)
        if whole is not None:
            part = part_of(whole, piece, run.content)
            self._target(part, run)[run.start : stop].copy_(from_buffer(buffer, run.dtype))
            if stop == count and run.slice in self._staged:
                part.copy_(self._staged.pop(run.slice).view(part.shape))

    def _target(self, part: Tensor, run: Run) -> Tensor:
        """Where the elements of a part are written, flat: itself, or a staging copy.

        A part that begins anew is staged anew: of one that was broken off nothing is left.
        """
        if part.is_contiguous():
            self._staged.pop(run.slice, None)
            return part.view(-1)
        if run.start == 0 or run.slice not in self._staged:
            self._staged[run.slice] = _empty((part.numel(),))
        return self._staged[run.slice]

    def _counts(self, piece: Slice) -> dict[Content, int]:
        """How many elements of each kind belong to a slice."""
        shapes = _shapes(piece.shape, piece.axes, self._layouts[self._groups[piece.parameter]])
        counts = {content: math.prod(shape) for content, shape in shapes.items()}
        return {Content.WEIGHT: piece.element_count, **counts}


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")
