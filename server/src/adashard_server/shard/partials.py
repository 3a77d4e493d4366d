"""What slices find out for an exchange: as numbers on a shard, and as bytes between shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import add

from adashard.wire import messages
from adashard.wire.placement import Slice, merged
from adashard.wire.spec import DType
from adashard.wire.tensors import from_buffer
from adashard_server.optim.partials import Partial


@dataclass(frozen=True, slots=True)
class Finding:
    """What measuring a slice has found.

    Attributes:
        squared_sum: of the mean gradient; not finite where an element is not.
        partial: its part of the sums over its parameter; None where that is not split.
    """

    squared_sum: float
    partial: Partial | None = None


def added(numbers: Iterable[float]) -> float:
    """The sum, from the first number to the last.

    The built-in sum is compensated from Python 3.12 on, and so is not the same everywhere.
    """
    total = 0.0
    for number in numbers:
        total += number
    return total


def short_count(piece: Slice) -> int:
    """Elements of the factor that all slices of the parameter share; 0 where there is none."""
    if piece.axes is None or piece.axis not in piece.axes or not piece.split:
        return 0
    return piece.element_count // piece.shape[piece.axis]


def summed(
    slices: Sequence[Slice], parts: Iterable[tuple[int, int, Partial]]
) -> tuple[messages.Partial, ...]:
    """Partials of slices or nodes, added up along the trees as far as they can be, to travel.

    Args:
        slices: all of the job.
        parts: (first slice, count, partial), ascending.
    """
    return tuple(packed(*node) for node in merged(slices, parts, add))


def packed(index: int, count: int, partial: Partial) -> messages.Partial:
    """The partial of `count` slices from `index` on, as it travels."""
    return messages.Partial(
        slice=index,
        count=count,
        weight_squared_sum=partial.weight_squared_sum,
        update_squared_sum=partial.update_squared_sum,
        least=partial.least,
        squares=partial.squares.numpy().tobytes(),
        ratios=partial.ratios.numpy().tobytes(),
    )


def unpacked(partial: messages.Partial) -> Partial:
    """The sums in a partial; its tensors are flat views."""
    return Partial(
        weight_squared_sum=partial.weight_squared_sum,
        update_squared_sum=partial.update_squared_sum,
        least=partial.least,
        squares=from_buffer(memoryview(partial.squares), DType.FLOAT32),
        ratios=from_buffer(memoryview(partial.ratios), DType.FLOAT32),
    )
