"""Partial sums as they travel, and their sums over the trees of a job's slices.

The tree itself is `optim.partials.merged`; here are the leaves of a job, and the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from adashard.wire import messages
from adashard.wire.placement import Slice
from adashard.wire.spec import DType
from adashard.wire.tensors import as_buffer, from_buffer
from adashard_server.optim import partials


@dataclass(frozen=True, slots=True)
class Finding:
    """What measuring a slice has found.

    Attributes:
        squared_sum: of the mean gradient; not finite where an element is not.
        partial: its part of the sums over its parameter; None where that is not split.
    """

    squared_sum: float
    partial: messages.Partial | None = None


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


def squares_by_node(
    slices: Sequence[Slice], squares: Mapping[int, float]
) -> list[tuple[int, int, float]]:
    """Squared sums of slices or nodes, added up to the largest subtrees that are whole.

    Args:
        slices: all of the job.
        squares: by index of a slice.

    Returns:
        (first slice, count, squared sum) by first slice.
    """
    parts = ((index, 1, squares[index]) for index in sorted(squares))
    return list(merged_squares(slices, parts))


def merged_squares(
    slices: Sequence[Slice], parts: Iterable[tuple[int, int, float]]
) -> Iterator[tuple[int, int, float]]:
    """Squared sums of nodes, ascending by their first slice, as far as they can be added up."""
    for first, of_parameter in _by_parameter(slices, parts):
        for place, count, total in partials.merged(of_parameter, lambda a, b: a + b):
            yield first + place, count, total


def merged(
    slices: Sequence[Slice], parts: Iterable[messages.Partial]
) -> tuple[messages.Partial, ...]:
    """Partials of nodes, ascending by their first slice, as far as they can be added up."""
    named = ((part.slice, part.count, unpacked(part)) for part in parts)
    return tuple(
        packed(first + place, count, total)
        for first, of_parameter in _by_parameter(slices, named)
        for place, count, total in partials.merged(of_parameter, lambda a, b: a + b)
    )


def _by_parameter(
    slices: Sequence[Slice], parts: Iterable[tuple[int, int, partials.T]]
) -> Iterator[tuple[int, list[tuple[int, int, partials.T]]]]:
    """Parts by parameter, with places in it: (its first slice, [(place, count, part)])."""
    for first, group in groupby(parts, key=lambda part: slices[part[0]].first):
        yield first, [(index - first, count, part) for index, count, part in group]


def packed(index: int, count: int, partial: partials.Partial) -> messages.Partial:
    """The partial of `count` slices from `index` on, as it travels."""
    return messages.Partial(
        slice=index,
        count=count,
        weight_squared_sum=partial.weight_squared_sum,
        update_squared_sum=partial.update_squared_sum,
        least=partial.least,
        squares=bytes(as_buffer(partial.squares.view(-1))),
        ratios=bytes(as_buffer(partial.ratios.view(-1))),
    )


def unpacked(partial: messages.Partial) -> partials.Partial:
    """The sums in a partial; its tensors are flat views."""
    return partials.Partial(
        weight_squared_sum=partial.weight_squared_sum,
        update_squared_sum=partial.update_squared_sum,
        least=partial.least,
        squares=from_buffer(memoryview(partial.squares), DType.FLOAT32),
        ratios=from_buffer(memoryview(partial.ratios), DType.FLOAT32),
    )
