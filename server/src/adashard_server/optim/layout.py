"""How a slice lies in its parameter, and how the passes see it: as matrices of rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from adashard_server.optim.factored import Axes

Factor = Literal["row", "column"]


class Layout:
    """How a slice lies in its parameter. Immutable.

    Args:
        shape: of the slice.
        whole: of the parameter.
        axes: the factored axes; None where the second moment is not factored.
        axis: the axis that is cut; None where the slice is the whole parameter.

    Attributes:
        long: the factor that lies along the cut; None where neither does.
        complete: the factor that the first pass completes: the long one, or the rows' where there
            is none.
        short: the other one.
        count: of how many elements of the parameter each element of the short factor is the mean.
        matrices: (B, N, M) as the passes see the slice.
        element_count: of the parameter.
    """

    def __init__(
        self, shape: Sequence[int], whole: Sequence[int], axes: Axes | None, axis: int | None
    ) -> None:
        self.shape, self.whole, self.axes = tuple(shape), tuple(whole), axes
        self.element_count = math.prod(whole)
        self.long: Factor | None = None
        self.complete: Factor = "row"
        self.short: Factor = "column"
        self.matrices = (1, 1, math.prod(shape))
        self._order = tuple(range(len(self.shape)))
        self._in_order = True
        if axes is not None:
            self._factor(axes, axis)

    def _factor(self, axes: Axes, axis: int | None) -> None:
        if axis in axes:
            self.long = self.complete = "row" if axis == axes.row else "column"
            self.short = "column" if self.long == "row" else "row"
        self.count = self.whole[axes.row if self.complete == "row" else axes.column]
        batch = [at for at in range(len(self.shape)) if at not in axes]
        self._order = (*batch, axes.row, axes.column)
        self._in_order = self._ascending(self._order)
        batches, rows, columns = (
            math.prod(self.shape[at] for at in batch),
            self.shape[axes.row],
            self.shape[axes.column],
        )
        self.matrices = (batches, rows, columns)
        self._means = {"row": (batches, rows), "column": (batches, columns)}
        self._kept = {"row": [*batch, axes.row], "column": [*batch, axes.column]}
        self._permuted = {name for name, kept in self._kept.items() if not self._ascending(kept)}

    def _ascending(self, axes: Sequence[int]) -> bool:
        """Whether elements lie in the order of these axes; those of length 1 may stand anywhere."""
        longer = [at for at in axes if self.shape[at] != 1]
        return longer == sorted(longer)

    def as_matrices(self, tensor: Tensor) -> Tensor:
        """A tensor of the slice's shape as (B, N, M): a view, or a copy if it must be permuted."""
        if not self._in_order:
            tensor = tensor.view(self.shape).permute(self._order).contiguous()
        return tensor.view(self.matrices)

    def restore(self, matrices: Tensor, tensor: Tensor) -> None:
        """Writes (B, N, M) back into the tensor that it was made of, where it is a copy."""
        if not self._in_order:
            ordered = matrices.view([self.shape[at] for at in self._order])
            back = [self._order.index(at) for at in range(len(self.shape))]
            tensor.view(self.shape).copy_(ordered.permute(back))

    def as_means(self, tensor: Tensor, factor: Factor) -> Tensor:
        """The state's tensor of a factor as (B, N) or (B, M): a view, or a copy if permuted."""
        if factor in self._permuted:
            kept = self._kept[factor]
            tensor = tensor.permute([sorted(kept).index(at) for at in kept]).contiguous()
        return tensor.view(self._means[factor])

    def restore_means(self, means_BK: Tensor, tensor: Tensor, factor: Factor) -> None:
        """Writes (B, N) or (B, M) into the state's tensor of a factor."""
        if factor in self._permuted:
            kept = self._kept[factor]
            ordered = means_BK.view([self.shape[at] for at in kept])
            tensor.copy_(ordered.permute([kept.index(at) for at in sorted(kept)]))
        else:
            tensor.view(self._means[factor]).copy_(means_BK)
