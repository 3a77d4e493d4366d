"""Factored second moments: what the means of rows and columns say of the whole.

The second moment V of an n x m matrix is kept as the means of its rows and of its columns, n + m
numbers instead of n * m. The matrix that they stand for,

    V_ij = R_i C_j / mean(R),

is the rank-1 matrix closest to V in the generalised Kullback-Leibler divergence, and V itself
where that has rank 1. Means are linear, so a moving average of the factors is the factoring of the
moving average.

Shape suffixes: N is the row axis, M the column axis, 1 an axis of length one. They are any two
axes of the tensor; all others are batch axes, left out of the names: one matrix is factored for
each place along them.

References:
    Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018,
    Algorithm 4. The paper keeps sums; means differ by a factor that cancels in V, and long rows
    do not overflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Axes(NamedTuple):
    """The two factored axes of a tensor.

    `row` is the axis that row means keep: they average over `column`. And the other way round.
    Which axes they are is agreed with the worker: `adashard.wire.placement.factored_axes`.
    """

    row: int
    column: int


def row_shape(shape: Sequence[int], axes: Axes) -> tuple[int, ...]:
    """Shape of the row means of a tensor of `shape`: without its column axis."""
    return tuple(size for axis, size in enumerate(shape) if axis != axes.column)


def column_shape(shape: Sequence[int], axes: Axes) -> tuple[int, ...]:
    """Shape of the column means of a tensor of `shape`: without its row axis."""
    return tuple(size for axis, size in enumerate(shape) if axis != axes.row)


def row_means(squared_NM: Tensor, axes: Axes) -> Tensor:
    """Mean of each row, in a new tensor of `row_shape`."""
    return squared_NM.mean(dim=axes.column)


def column_means(squared_NM: Tensor, axes: Axes) -> Tensor:
    """Mean of each column, in a new tensor of `column_shape`."""
    return squared_NM.mean(dim=axes.row)


def decay(moment: Tensor, latest: Tensor, beta2: float) -> None:
    """Mixes the latest mean into its moving average, in place.

    Args:
        moment: the average so far; with beta2 = 0 (step 1) its finite values do not matter.
        latest: the same shape; not modified.
        beta2: how much of the old average is kept, in [0, 1).
    """
    moment.mul_(beta2).add_(latest, alpha=1.0 - beta2)


def inverse_root(moment: Tensor) -> Tensor:
    """1 / sqrt(moment) in a new tensor, and 0 where the moment is 0.

    A moment is 0 where squared gradients have been 0, or too small for the format: there is
    nothing to divide, and 0 * inf would be NaN.
    """
    return moment.rsqrt().masked_fill_(moment == 0, 0.0)


def inverse_root_of_product(row_N: Tensor, column_M: Tensor, axes: Axes, floor: float) -> Tensor:
    """1 / sqrt(V) of the matrix V that the factors stand for, in a new tensor of its whole shape.

    The roots of both factors are multiplied, V itself is never formed: 1e-30 * 1e-30 would
    already be 0 in float32.

    Args:
        row_N: row means, as by `row_means`.
        column_M: column means, as by `column_means`.
        axes: those of the tensor.
        floor: lower bound of mean(R), above 0.
    """
    row_N1, column_1M = row_N.unsqueeze(axes.column), column_M.unsqueeze(axes.row)
    mean_11 = row_N1.mean(dim=axes.row, keepdim=True).clamp_(min=floor)
    return inverse_root(row_N1 / mean_11) * inverse_root(column_1M)
