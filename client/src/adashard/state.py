"""The optimizer state of a model: whole tensors on a worker, parts of slices on the way.

A worker that saves it asks all shards for it, and brings it along where a job begins with a state
that was loaded. What it holds of it while it trains is in `copies`.

What a slice has of a moment is cut like the slice. The mean along the axis that is cut has no such
axis: it belongs to the whole parameter, and every slice has it all, with the same bits.
"""

from __future__ import annotations

import hashlib
import logging
import math
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from adashard.arrivals import Arrival, Part
from adashard.push import Replies
from adashard.wire.errors import Internal, InvalidFrame, InvalidSettings
from adashard.wire.messages import Content, Outcome, Record
from adashard.wire.placement import Slice, cut, factored_axes
from adashard.wire.spec import AdafactorLayout, DType, JobSpec
from adashard.wire.tensors import as_buffer, flat_on_cpu, from_buffer

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


def layout_of(spec: JobSpec, parameter: int) -> AdafactorLayout:
    """What the state of a parameter consists of."""
    return spec.groups[spec.parameters[parameter].group].adafactor or AdafactorLayout()


def state_parts(spec: JobSpec, piece: Slice) -> dict[Content, Part]:
    """What the state of a slice consists of, in the order in which it travels."""
    return dict(_parts(piece.shape, piece.axes, layout_of(spec, piece.parameter)))


@lru_cache(maxsize=1024)  # asked for every run that comes; a model has few shapes of slices
def _parts(
    shape: tuple[int, ...], axes: tuple[int, int] | None, layout: AdafactorLayout
) -> Mapping[Content, Part]:
    shapes = _shapes(shape, axes, layout)
    return {content: Part(DType.FLOAT32, math.prod(one)) for content, one in shapes.items()}


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
        layout = layout_of(spec, index)
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


# --- on its way from shards ----------------------------------------------------------------------


class Gathering:
    """A job's state as it comes, one copy of it all. Not thread-safe; a lock covers its calls.

    Args:
        spec: the job, as its entry has it.
        version: the version that is asked for.
        masters: parameters whose float32 weights are kept; those of others are passed over.
    """

    def __init__(self, spec: JobSpec, version: int, masters: Collection[int]) -> None:
        self._spec, self._slices = spec, cut(spec)
        self._version = version
        self._record: Record | None = None
        self._whole: list[dict[Content, Tensor]] = []
        for index, parameter in enumerate(spec.parameters):
            shapes = moment_shapes(parameter.shape, layout_of(spec, index))
            if index in masters:
                shapes[Content.WEIGHT] = parameter.shape
            self._whole.append({content: _empty(shape) for content, shape in shapes.items()})
        self._came: set[int] = set()

    def parts(self, index: int) -> dict[Content, Part]:
        """What is expected of a slice: all in float32.

        Raises:
            InvalidFrame: there is no such slice.
        """
        if not 0 <= index < len(self._slices):
            raise InvalidFrame(f"there is no slice {index}; the job has {len(self._slices)}")
        piece = self._slices[index]
        weights = {Content.WEIGHT: Part(DType.FLOAT32, piece.element_count)}
        return weights | state_parts(self._spec, piece)

    def has(self, indices: Iterable[int]) -> bool:
        """Whether the slices have come whole."""
        return self._came.issuperset(indices)

    def receive(self, came: Record | Arrival) -> None:
        """Takes what comes next in a shard's answer.

        Raises:
            InvalidFrame: it is not about the version.
            Internal: two shards have different records.
        """
        if isinstance(came, Record):
            self._take_record(came)
        elif not came.pieces:
            raise InvalidFrame(f"slice {came.slice} is said to be unchanged, and none was here")
        else:
            self._take(came)

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

    def _take(self, arrival: Arrival) -> None:
        piece = self._slices[arrival.slice]
        for content, came in arrival.pieces.items():
            whole = self._whole[piece.parameter].get(content)
            if whole is not None:
                part = part_of(whole, piece, content)
                flat = torch.cat([from_buffer(buffer, came.dtype) for buffer in came.buffers])
                part.copy_(flat.view(part.shape))
        self._came.add(arrival.slice)


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")
