"""What slices of one parameter contribute to the sums over all of it, and how these are added.

A parameter that is cut has three sums that no slice knows alone: of squared gradients along the
cut axis (which make the short factor), of squares divided by the long factor (which make RMS(U)),
and of squared weights (RMS(X)). Each slice gives its part; parts are added over one binary tree
whose leaves are the slices in order (`adashard.wire.placement.merged`). The tree is fixed by the
number of slices, so the sums have the same bits whoever holds which slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """One part of the sums; its tensors are not to be written to.

    Attributes:
        weight_squared_sum: of X, before the step.
        update_squared_sum: of U before clipping, where slices know theirs alone; else 0.
        least: least element of the long factor; infinite where no factor lies along the cut.
        squares: sums of G^2 along the cut axis, (B, K) on the CPU; (B, 0) where there is none.
        ratios: sums of G^2 / long factor along the cut axis, in the same shape.
    """

    weight_squared_sum: float
    update_squared_sum: float
    least: float
    squares: Tensor
    ratios: Tensor

    def __add__(self, other: Partial) -> Partial:
        """The part of both together: this one's slices come before the other's."""
        return Partial(
            weight_squared_sum=self.weight_squared_sum + other.weight_squared_sum,
            update_squared_sum=self.update_squared_sum + other.update_squared_sum,
            least=min(self.least, other.least),
            squares=self.squares + other.squares,
            ratios=self.ratios + other.ratios,
        )


def alone(weight_squared_sum: float, update_squared_sum: float) -> Partial:
    """The part of a slice along whose cut no factor lies: two numbers."""
    nothing = torch.empty(0)
    return Partial(
        weight_squared_sum=weight_squared_sum,
        update_squared_sum=update_squared_sum,
        least=math.inf,
        squares=nothing,
        ratios=nothing,
    )
