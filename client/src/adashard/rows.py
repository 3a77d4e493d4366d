"""Row-sparse gradients, as embeddings have them: only the rows that were touched travel.

torch's COO layout with one sparse axis: numbers of rows, and a value for each of them. What lies
between the runs of such a gradient is zero, which its push says once for each parameter (`sparse`
of a `Begin`) and once at the end of each slice, by a run without elements. The shard puts the runs
into zeros and goes on as with any gradient, so the bits are those of the dense one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from adashard.wire.bits import bits_of
from adashard.wire.errors import InvalidGradient
from adashard.wire.frames import Extent
from adashard.wire.placement import Slice
from adashard.wire.spec import DType


def is_sparse(gradient: Tensor) -> bool:
    """Whether a gradient comes in rows; what else is not dense never gets so far."""
    return gradient.layout is torch.sparse_coo


def sparse_bits(gradients: Mapping[int, Tensor], count: int) -> bytes:
    """One bit for each of `count` parameters, least significant first: whether it is in rows."""
    return bits_of((index for index, one in gradients.items() if is_sparse(one)), count)


def coalesced_rows(name: str, gradient: Tensor) -> Tensor:
    """A row-sparse gradient with its rows ascending and each of them once; none is fine.

    torch checks neither the numbers of rows nor that a gradient marked as coalesced is, and what
    is out of range would be written beyond the tensor.

    Args:
        name: of the parameter.
        gradient: in any layout but the strided one; not changed, its memory may be shared.

    Raises:
        InvalidGradient: it is not row-sparse, or the number of a row is out of range.
    """
    if not is_sparse(gradient) or gradient.sparse_dim() != 1:
        axes = f" over {gradient.sparse_dim()} axes" if is_sparse(gradient) else ""
        raise InvalidGradient(
            f"the gradient of {name!r} is {gradient.layout}{axes}: only dense gradients travel, "
            "and those that are sparse in rows",
            remedy="Call to_dense() on it, or build the layer with sparse=False.",
            tensor=name,
        )
    indices, values = gradient._indices().contiguous(), gradient._values()
    rows, row_count = indices[0], gradient.shape[0]
    outside = rows[(rows < 0) | (rows >= row_count)]
    if outside.numel():
        raise InvalidGradient(
            f"the gradient of {name!r} has a row {int(outside[0])}, and the parameter has "
            f"{row_count} rows; nothing was sent, and the weights are untouched",
            tensor=name,
            index=int(outside[0]),
        )
    ascending = bool((rows[1:] > rows[:-1]).all())
    return torch.sparse_coo_tensor(
        indices, values, gradient.shape, is_coalesced=ascending, check_invariants=False
    ).coalesce()


def values_within(gradient: Tensor, piece: Slice) -> Tensor:
    """What of a coalesced gradient's values lies in a slice: (touched rows, ...), a view."""
    if piece.axis > 0:
        return gradient.values().narrow(piece.axis, piece.start, piece.stop - piece.start)
    first, last = _touched(gradient, piece)
    return gradient.values()[first:last]


def row_extents(gradient: Tensor, piece: Slice, dtype: DType) -> Iterator[Extent]:
    """The runs of elements of the rows of a slice that were touched, ascending, and its end.

    Rows beside each other are one run. Their elements are those of `values_within`, row by row,
    and travel as `dtype`.
    """
    width, row = math.prod(piece.shape[1:]), piece.shape[-1]
    for start, count in _stretches(_rows_within(gradient, piece)):
        yield Extent(piece.index, count * width, row, dtype, start=start * width)
    yield Extent(piece.index, 0, row, dtype, start=piece.element_count)


def _rows_within(gradient: Tensor, piece: Slice) -> Tensor:
    """Numbers, in the slice, of its rows that were touched."""
    rows = gradient.indices()[0]
    if piece.axis > 0:
        return rows
    first, last = _touched(gradient, piece)
    return rows[first:last] - piece.start


def _touched(gradient: Tensor, piece: Slice) -> tuple[int, int]:
    """First and one beyond the last of the gradient's values that are in rows of the slice."""
    rows = gradient.indices()[0]
    borders = torch.tensor([piece.start, piece.stop], device=rows.device)
    first, last = torch.searchsorted(rows, borders).tolist()
    return first, last


def _stretches(rows: Tensor) -> Iterator[tuple[int, int]]:
    """Where rows that follow each other begin, and how many there are; for ascending rows."""
    gaps = torch.nonzero(rows[1:] - rows[:-1] > 1).flatten() + 1
    numbers = rows.tolist()
    for first, last in itertools.pairwise([0, *gaps.tolist(), len(numbers)]):
        if first < last:
            yield numbers[first], last - first
