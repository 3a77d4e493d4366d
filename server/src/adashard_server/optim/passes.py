"""The passes that a step makes over a slice, in a line or two each: what faster code is held to.

A *factored* slice lies as B matrices of N rows and M columns. It may be a part of its parameter,
cut across the rows (whole rows, some of them), across the columns, or across the batch. What is
summed over rows that all lie here is complete; the rest are *partial* sums (`partials.py`).

Suffixes: B, N, M as above; K is either N or M. Tensors are float32 on any device, or float64 where
tests want to see the mathematics without rounding. `gradient` is the sum over workers; multiplied
with `scale` it is G. Where squares are averaged they are bounded by `bound`, so that no sum of
finite ones overflows. A moment so small that its inverse is beyond the format counts as 0.

`compiled.py` has the same passes for the CPU with every addition in a written order; those here
are used on other devices, where bits depend on torch and on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adashard_server.optim.blocks import decoded


class Passes:
    """The passes, in torch. Stateless; a subclass is faster and no different but in rounding."""

    @staticmethod
    def square_sum(matrix_NM: Tensor, scale: float = 1.0) -> float:
        """Sum of (scale * matrix)^2 in float64; NaN where an element is not finite."""
        total = float((matrix_NM * scale).double().square().sum())
        return total if math.isfinite(total) else math.nan

    @staticmethod
    def rows_first(
        gradient_BNM: Tensor,
        scale: float,
        row_BN: Tensor,
        row_new_BN: Tensor,
        squares_BM: Tensor,
        ratios_BM: Tensor,
        *,
        beta2: float,
        eps1: float,
        bound: float,
    ) -> float:
        """Rows that are whole: new row means, and sums over these rows. Writes three tensors.

        Args:
            gradient_BNM: as it came; not modified.
            scale: what makes it G.
            row_BN: R of the step before.
            row_new_BN: R; written, as are the next two.
            squares_BM: sum over rows of G^2, bounded.
            ratios_BM: sum over rows of G^2 / R as they are; 0 for rows where R is.
            beta2: how much of the old R is kept.
            eps1: added to squares; 0 where it is a lower bound instead.
            bound: of squares.

        Returns:
            The sum of G^2, not bounded; NaN where an element is not finite.

        References:
            docs/adafactor.md, "One round is enough"; the sums are what that section calls c and P.
        """
        scaled_BNM = gradient_BNM * scale
        squared_BNM = scaled_BNM.square().clamp_(max=bound)
        row_new_BN.copy_(row_BN * beta2 + (squared_BNM.mean(dim=2) + eps1) * (1.0 - beta2))
        squares_BM.copy_(squared_BNM.sum(dim=1))
        inverse_BN1 = _inverse(row_new_BN).unsqueeze(2)
        ratios_BM.copy_(((scaled_BNM * inverse_BN1) * scaled_BNM).sum(dim=1))
        return Passes.square_sum(gradient_BNM, scale)

    @staticmethod
    def columns_first(
        gradient_BNM: Tensor,
        scale: float,
        column_BM: Tensor,
        column_new_BM: Tensor,
        squares_BN: Tensor,
        ratios_BN: Tensor,
        *,
        beta2: float,
        eps1: float,
        bound: float,
    ) -> float:
        """Columns that are whole: `rows_first` with rows and columns changed over."""
        scaled_BNM = gradient_BNM * scale
        squared_BNM = scaled_BNM.square().clamp_(max=bound)
        column_new_BM.copy_(column_BM * beta2 + (squared_BNM.mean(dim=1) + eps1) * (1.0 - beta2))
        squares_BN.copy_(squared_BNM.sum(dim=2))
        inverse_B1M = _inverse(column_new_BM).unsqueeze(1)
        ratios_BN.copy_(((scaled_BNM * inverse_B1M) * scaled_BNM).sum(dim=2))
        return Passes.square_sum(gradient_BNM, scale)

    @staticmethod
    def decay(
        moment_BK: Tensor, squares_BK: Tensor, *, beta2: float, count: int, eps1: float, out: Tensor
    ) -> None:
        """Mixes sums of squares over `count` elements into their means; writes `out`."""
        out.copy_(moment_BK * beta2 + (squares_BK / count + eps1) * (1.0 - beta2))

    @staticmethod
    def means(moment_BK: Tensor, floor: float) -> Tensor:
        """Mean of each factor, at least `floor`: (B,) in float64."""
        return moment_BK.double().mean(dim=1).clamp_(min=floor)

    @staticmethod
    def quotient_sum(ratios_BK: Tensor, moment_BK: Tensor, numerators_B: Tensor) -> float:
        """Sum over B of numerator times the sum over K of ratio / moment; 0 where that is 0."""
        inverse_BK = moment_BK.double().reciprocal().masked_fill_(_vanishes(moment_BK), 0.0)
        return float(((ratios_BK * inverse_BK).sum(dim=1) * numerators_B).sum())

    @staticmethod
    def inverse_roots(moment_BK: Tensor, numerators_B: Tensor) -> Tensor:
        """sqrt(numerator / moment) in a new tensor like `moment`, and 0 where that is 0."""
        quotient_BK = numerators_B.unsqueeze(1) / moment_BK.double()
        return quotient_BK.sqrt_().masked_fill_(_vanishes(moment_BK), 0.0).to(moment_BK.dtype)

    @staticmethod
    def update(
        weight_BNM: Tensor,
        gradient_BNM: Tensor,
        scale: float,
        step: float,
        row_BN: Tensor,
        column_BM: Tensor,
        *,
        cap: float,
        keep: float,
        momentum_BNM: Tensor | None,
        beta1: float,
    ) -> float:
        """X = keep X - step * U for U = scale * gradient * min(row column, cap).

        Writes weight and momentum.

        Args:
            weight_BNM: X.
            gradient_BNM: as it came; not modified.
            scale: what makes it G.
            step: the step size, divided by what clipping divides by.
            row_BN: row factor of 1 / sqrt(V).
            column_BM: column factor of it.
            cap: upper bound of 1 / sqrt(V).
            keep: what weight decay leaves of the weight; 1 for all.
            momentum_BNM: average of what is subtracted, which is subtracted instead.
            beta1: how much of that average is kept.

        Returns:
            The sum of X^2 after the update, in float64.
        """
        inverse_BNM = (row_BN.unsqueeze(2) * column_BM.unsqueeze(1)).clamp_(max=cap)
        update_BNM = (gradient_BNM * scale) * inverse_BNM * step
        _subtract(weight_BNM, update_BNM, keep, momentum_BNM, beta1)
        return Passes.square_sum(weight_BNM)

    @staticmethod
    def capped_square_sum(
        gradient_BNM: Tensor, scale: float, row_BN: Tensor, column_BM: Tensor, cap: float
    ) -> float:
        """Sum of U^2 where 1 / sqrt(V) = min(row column, cap), element by element, in float64."""
        inverse_BNM = (row_BN.unsqueeze(2) * column_BM.unsqueeze(1)).clamp_(max=cap)
        return float(((gradient_BNM * scale) * inverse_BNM).double().square().sum())

    @staticmethod
    def full_square_sum(
        gradient: Tensor,
        scale: float,
        moment: Tensor,
        *,
        beta2: float,
        eps1: float,
        floor: float,
        bound: float,
    ) -> float:
        """Sum of U^2 = G^2 / max(sqrt(V), floor)^2 for a moment that is not factored; all flat.

        V is not written: a step that is dropped must leave nothing behind.
        """
        _, update = _full_update(gradient, scale, moment, beta2, eps1, floor, bound)
        return float(update.double().square().sum())

    @staticmethod
    def update_full(
        weight: Tensor,
        gradient: Tensor,
        scale: float,
        step: float,
        moment: Tensor,
        *,
        beta2: float,
        eps1: float,
        floor: float,
        bound: float,
        keep: float,
        momentum: Tensor | None,
        beta1: float,
    ) -> float:
        """The update with a moment that is not factored; writes weight, moment and momentum.

        Returns:
            The sum of X^2 after the update, in float64.
        """
        new, update = _full_update(gradient, scale, moment, beta2, eps1, floor, bound)
        moment.copy_(new)
        _subtract(weight, update.mul_(step), keep, momentum, beta1)
        return Passes.square_sum(weight)

    @staticmethod
    def accumulate(total: Tensor, addend: Tensor, share: float, *, first: bool) -> None:
        """Adds `share * addend` to `total`, or puts it there if it is the `first`; in place."""
        if addend.dtype is torch.uint8:
            addend = decoded(addend, total.numel())
        scaled = addend.to(total.device, total.dtype) * share
        total.copy_(scaled) if first else total.add_(scaled)


def _vanishes(moment: Tensor) -> Tensor:
    """Whether a moment counts as 0: squares there are 0, or next to it."""
    return ~torch.isfinite(moment.reciprocal())


def _inverse(moment: Tensor) -> Tensor:
    """1 / moment, and 0 where that is beyond the format."""
    return moment.reciprocal().masked_fill_(_vanishes(moment), 0.0)


def _full_update(
    gradient: Tensor,
    scale: float,
    moment: Tensor,
    beta2: float,
    eps1: float,
    floor: float,
    bound: float,
) -> tuple[Tensor, Tensor]:
    """The new second moment and the update, both new tensors."""
    scaled = gradient * scale
    new = moment * beta2 + (scaled.square().clamp_(max=bound) + eps1) * (1.0 - beta2)
    divisor = new.sqrt().clamp_(min=floor)
    return new, (scaled / divisor).masked_fill_(divisor == 0, 0.0)


def _subtract(
    weight: Tensor, update: Tensor, keep: float, momentum: Tensor | None, beta1: float
) -> None:
    if momentum is not None:
        update = momentum.mul_(beta1).add_(update, alpha=1.0 - beta1)
    weight.mul_(keep).sub_(update)
