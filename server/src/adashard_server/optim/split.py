"""One slice of a parameter, one step of Adafactor: what it contributes, and its update.

`adafactor.py` is the step of a whole parameter. Here it comes in two halves with an exchange
between them, so that slices may lie anywhere:

    measure     one pass over the gradient: the long factor, and this slice's partial sums
    (exchange)  partial sums of all slices of the parameter are added: `partials.merged`
    apply       the short factor, RMS(U), RMS(X) from the sums; then one pass over the weight

The *long* factor is the one that lies along the cut axis: each slice has its part of it alone.
The *short* factor is the same in all slices, and each has all of it. Where no factor lies along
the cut (a slice that is a whole parameter, or whole matrices of a batch, or a moment that is not
factored), a slice knows both factors and RMS(U)^2 without any exchange, and two numbers are left.

docs/adafactor.md derives it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adashard_server.optim import clipping, partials
from adashard_server.optim.adafactor import Measures, Settings, State, weight_decay_scale
from adashard_server.optim.factored import Axes
from adashard_server.optim.partials import Partial
from adashard_server.optim.passes import Passes

_F32_MAX = torch.finfo(torch.float32).max
_CAP = 1.0 / torch.finfo(torch.float32).tiny  # of 1 / sqrt(V), so that it is finite


class Layout:
    """How a slice lies in its parameter. Immutable.

    Args:
        shape: of the slice.
        whole: of the parameter.
        axes: the factored axes; None where the second moment is not factored.
        axis: the axis that is cut; None where the slice is the whole parameter.

    Attributes:
        long: the factor that lies along the cut, "row" or "column"; None where neither does.
        matrices: (B, N, M) as the passes see the slice.
        element_count: of the parameter.
    """

    def __init__(
        self, shape: Sequence[int], whole: Sequence[int], axes: Axes | None, axis: int | None
    ) -> None:
        self.shape, self.whole, self.axes = tuple(shape), tuple(whole), axes
        self.element_count = math.prod(whole)
        self.long: str | None = None
        self.matrices = (1, 1, math.prod(shape))
        if axes is None:
            return
        if axis in axes:
            self.long = "row" if axis == axes.row else "column"
        batch = [at for at in range(len(self.shape)) if at not in axes]
        self._order = (*batch, axes.row, axes.column)
        longer = [at for at in self._order if self.shape[at] != 1]
        self._in_order = longer == sorted(longer)
        rows, columns = self.shape[axes.row], self.shape[axes.column]
        self.matrices = (math.prod(self.shape[at] for at in batch), rows, columns)

    @property
    def cut_count(self) -> int:
        """Length of the parameter along the axis that the long factor lies along."""
        assert self.axes is not None
        return self.whole[self.axes.row if self.long == "row" else self.axes.column]

    def as_matrices(self, tensor: Tensor) -> Tensor:
        """A tensor of the slice's shape as (B, N, M): a view, or a copy if it must be permuted."""
        shaped = tensor.view(self.shape)
        if self.axes is not None and not self._in_order:
            shaped = shaped.permute(self._order).contiguous()
        return shaped.view(self.matrices)

    def restore(self, matrices: Tensor, tensor: Tensor) -> None:
        """Writes (B, N, M) back into the tensor that it was made of, where it is a copy."""
        if self.axes is not None and not self._in_order:
            ordered = matrices.view([self.shape[at] for at in self._order])
            back = [self._order.index(at) for at in range(len(self.shape))]
            tensor.view(self.shape).copy_(ordered.permute(back))

    def row_means(self, row: Tensor) -> Tensor:
        """Row means in the state's shape as (B, N), which all but the order of axes has."""
        return self._factor(row, dropped=1)

    def column_means(self, column: Tensor) -> Tensor:
        """Column means in the state's shape as (B, M)."""
        return self._factor(column, dropped=0)

    def restore_factor(self, means_BK: Tensor, factor: Tensor, *, row: bool) -> None:
        """Writes (B, N) or (B, M) into the state's tensor."""
        kept = self._kept(dropped=1 if row else 0)
        ordered = means_BK.view([self.shape[at] for at in kept])
        factor.copy_(ordered.permute([kept.index(at) for at in sorted(kept)]))

    def _factor(self, factor: Tensor, *, dropped: int) -> Tensor:
        kept = self._kept(dropped)
        ordered = factor.permute([sorted(kept).index(at) for at in kept]).contiguous()
        return ordered.view(self.matrices[0], self.matrices[2 - dropped])

    def _kept(self, dropped: int) -> list[int]:
        """Axes of a factor in the order of the passes; `dropped` is 1 for rows, 0 for columns."""
        assert self.axes is not None
        return [at for at in self._order if at != self.axes[dropped]]


@dataclass(frozen=True, slots=True)
class Measured:
    """What the first pass over a slice has found; the state is as it was.

    Attributes:
        gradient_squared_sum: of G; NaN where an element is not finite.
        partial: the slice's part of the sums over its parameter.
        row: new row means (B, N), where they are complete.
        column: new column means (B, M), where they are complete.
    """

    gradient_squared_sum: float
    partial: Partial
    row: Tensor | None = None
    column: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Factors:
    """The factored second moment after a step, and 1 / sqrt(V) as the product of two factors."""

    row_BN: Tensor
    column_BM: Tensor
    mean_B: Tensor
    inverse_row_BN: Tensor
    inverse_column_BM: Tensor
    may_cap: bool


class SliceStep:
    """One step of one slice: settings and scalars that `measure` and `apply` have in common.

    Stateless but for its arguments; tensors that are passed in are the caller's.

    Args:
        layout: how the slice lies in its parameter.
        settings: hyper-parameters of the step.
        beta2: weight of the old second moment, in [0, 1).
        scale: what makes the sum over workers the mean G, bounded in norm.
        passes: the loops.
    """

    def __init__(
        self,
        layout: Layout,
        settings: Settings,
        *,
        beta2: float,
        scale: float,
        passes: type[Passes],
    ) -> None:
        self.layout, self.settings, self.passes = layout, settings, passes
        self._beta2, self._scale = beta2, scale
        self._added_eps1 = 0.0 if settings.clamp_eps else settings.eps1
        self._floor = settings.eps1 if settings.clamp_eps else 0.0
        self._bound = 0.5 * _F32_MAX / max(1, layout.element_count)

    # --- the first pass -------------------------------------------------------------------------

    def measure(self, gradient: Tensor, state: State, weight_squared_sum: float) -> Measured:
        """The first pass; writes nothing.

        Args:
            gradient: the sum over workers, flat, of the slice.
            state: of the step before.
            weight_squared_sum: of the slice.
        """
        if self.layout.axes is None:
            return self._measure_full(gradient, state, weight_squared_sum)
        gradient_BNM = self.layout.as_matrices(gradient)
        if self.layout.long == "column":
            return self._measure_columns(gradient_BNM, state, weight_squared_sum)
        return self._measure_rows(gradient_BNM, state, weight_squared_sum)

    def _measure_full(self, gradient: Tensor, state: State, weight_squared_sum: float) -> Measured:
        assert state.full is not None
        update_squared_sum = self.passes.full_square_sum(
            gradient,
            self._scale,
            state.full.view(-1),
            beta2=self._beta2,
            eps1=self._added_eps1,
            floor=self._floor,
            bound=self._bound,
        )
        squared_sum = self.passes.square_sum(gradient.view(1, -1), self._scale)
        return Measured(squared_sum, partials.alone(weight_squared_sum, update_squared_sum))

    def _measure_rows(
        self, gradient_BNM: Tensor, state: State, weight_squared_sum: float
    ) -> Measured:
        assert state.row is not None
        row_BN = self.layout.row_means(state.row)
        new_BN = torch.empty_like(row_BN)
        squares_BM = gradient_BNM.new_empty(gradient_BNM.shape[0], gradient_BNM.shape[2])
        ratios_BM = torch.empty_like(squares_BM)
        squared_sum = self.passes.rows_first(
            gradient_BNM,
            self._scale,
            row_BN,
            beta2=self._beta2,
            eps1=self._added_eps1,
            bound=self._bound,
            row_new_BN=new_BN,
            squares_BM=squares_BM,
            ratios_BM=ratios_BM,
        )
        if self.layout.long == "row":
            partial = _partial(weight_squared_sum, new_BN, squares_BM, ratios_BM)
            return Measured(squared_sum, partial, row=new_BN)
        factors = self._factors(new_BN, self._short(state, squares_BM))
        update_squared_sum = (
            self._capped_square_sum(gradient_BNM, factors)
            if factors.may_cap
            else self._bilinear(factors, ratios_BM)
        )
        partial = partials.alone(weight_squared_sum, update_squared_sum)
        return Measured(squared_sum, partial, row=new_BN, column=factors.column_BM)

    def _measure_columns(
        self, gradient_BNM: Tensor, state: State, weight_squared_sum: float
    ) -> Measured:
        assert state.column is not None
        column_BM = self.layout.column_means(state.column)
        new_BM = torch.empty_like(column_BM)
        squares_BN = gradient_BNM.new_empty(gradient_BNM.shape[:2])
        ratios_BN = torch.empty_like(squares_BN)
        squared_sum = self.passes.columns_first(
            gradient_BNM,
            self._scale,
            column_BM,
            beta2=self._beta2,
            eps1=self._added_eps1,
            bound=self._bound,
            column_new_BM=new_BM,
            squares_BN=squares_BN,
            ratios_BN=ratios_BN,
        )
        partial = _partial(weight_squared_sum, new_BM, squares_BN, ratios_BN)
        return Measured(squared_sum, partial, column=new_BM)

    def clamped(self, gradient: Tensor, state: State, measured: Measured, total: Partial) -> float:
        """Sum of U^2 over the slice where the lower bound of V may bind; 0 where it cannot.

        Only for slices with a long factor and eps1 as a bound, which the bilinear form of RMS(U)
        leaves out; all slices of a parameter come to the same answer whether it may bind.
        """
        factors = self._combined(state, measured, total)
        if not factors.may_cap:
            return 0.0
        return self._capped_square_sum(self.layout.as_matrices(gradient), factors)

    # --- between the passes ---------------------------------------------------------------------

    def _short(self, state: State, squares_BK: Tensor) -> Tensor:
        """The short factor after the step, from sums of squares over the whole parameter."""
        if self.layout.long == "column":
            assert state.row is not None
            old_BK = self.layout.row_means(state.row)
            count = self.layout.cut_count
        else:
            assert state.column is not None
            old_BK = self.layout.column_means(state.column)
            count = self.layout.cut_count if self.layout.long else self.layout.matrices[1]
        new_BK = torch.empty_like(old_BK)
        squares_BK = squares_BK.view(old_BK.shape).to(old_BK.device)
        self.passes.decay(
            old_BK, squares_BK, beta2=self._beta2, count=count, eps1=self._added_eps1, out=new_BK
        )
        return new_BK

    def _combined(self, state: State, measured: Measured, total: Partial) -> _Factors:
        """Both factors after the step; the short one from the sums over the whole parameter."""
        if self.layout.long is None:
            assert measured.row is not None
            assert measured.column is not None
            return self._factors(measured.row, measured.column)
        short_BK = self._short(state, total.squares)
        row_BN = short_BK if measured.row is None else measured.row
        column_BM = short_BK if measured.column is None else measured.column
        return self._factors(row_BN, column_BM, least=total.least)

    def _factors(self, row_BN: Tensor, column_BM: Tensor, least: float | None = None) -> _Factors:
        """Row and column factor of 1 / sqrt(V) = sqrt(mean / (R C)).

        The mean over R equals that over C. It is taken over the short factor, which is the same
        in all slices.
        """
        short_BK = row_BN if self.layout.long == "column" else column_BM
        long_BK = column_BM if self.layout.long == "column" else row_BN
        mean_B = self.passes.means(short_BK, self._floor)
        ones_B = torch.ones_like(mean_B)
        least = _least(long_BK) if least is None else least
        return _Factors(
            row_BN=row_BN,
            column_BM=column_BM,
            mean_B=mean_B,
            inverse_row_BN=self.passes.inverse_roots(row_BN, mean_B),
            inverse_column_BM=self.passes.inverse_roots(column_BM, ones_B),
            may_cap=self._may_cap(least * _least(short_BK), mean_B),
        )

    def _may_cap(self, least: float, mean_B: Tensor) -> bool:
        """Whether the lower bound of sqrt(V) may bind: `least` is R C at least, V that / mean."""
        largest = max(mean_B.tolist(), default=0.0)
        return self.settings.clamp_eps and least < self._floor**2 * largest

    def _bilinear(self, factors: _Factors, ratios_BK: Tensor) -> float:
        """Sum of U^2 = mean * sum of (sum of G^2 / long) / short, where no bound binds."""
        short_BK = factors.row_BN if self.layout.long == "column" else factors.column_BM
        ratios_BK = ratios_BK.view(short_BK.shape).to(short_BK.device)
        return self.passes.quotient_sum(ratios_BK, short_BK, factors.mean_B)

    def _capped_square_sum(self, gradient_BNM: Tensor, factors: _Factors) -> float:
        return self.passes.capped_square_sum(
            gradient_BNM,
            self._scale,
            factors.inverse_row_BN,
            factors.inverse_column_BM,
            self._cap(factors),
        )

    def _cap(self, factors: _Factors) -> float:
        """Upper bound of 1 / sqrt(V)."""
        return 1.0 / self._floor if factors.may_cap else _CAP

    # --- the second pass ------------------------------------------------------------------------

    def apply(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: State,
        measured: Measured,
        total: Partial,
        *,
        rho: float,
    ) -> tuple[Measures, float]:
        """Takes the step, in place on weight and state.

        Args:
            weight: flat, of the slice.
            gradient: the sum over workers, flat; not modified.
            state: of the step before; becomes that of this one.
            measured: what `measure` found with the same gradient, state and settings.
            total: sum of the partials of all slices of the parameter.
            rho: relative step size, or learning rate.

        Returns:
            What the step did to the whole parameter, and the slice's sum of X^2 after it.
        """
        alpha = rho
        if self.settings.scale_parameter:
            rms = clipping.root_mean_square(total.weight_squared_sum, self.layout.element_count)
            alpha = max(self.settings.eps2, rms) * rho
        if self.layout.axes is None:
            measures = self._measures(total.update_squared_sum, alpha)
            return measures, self._apply_full(weight, gradient, state, measures)
        factors = self._combined(state, measured, total)
        update_squared_sum = total.update_squared_sum
        if self.layout.long is not None and not factors.may_cap:
            update_squared_sum = self._bilinear(factors, total.ratios)
        measures = self._measures(update_squared_sum, alpha)
        return measures, self._apply_factored(weight, gradient, state, factors, measures)

    def _measures(self, update_squared_sum: float, alpha: float) -> Measures:
        rms = clipping.root_mean_square(update_squared_sum, self.layout.element_count)
        ratio = clipping.clip_ratio(rms, self.settings.clip_threshold)
        return Measures(update_squared_sum, ratio, alpha)

    def _keep(self, alpha: float) -> float:
        """What weight decay leaves of a weight."""
        return 1.0 - self.settings.weight_decay * weight_decay_scale(self.settings, alpha)

    def _apply_full(
        self, weight: Tensor, gradient: Tensor, state: State, measures: Measures
    ) -> float:
        assert state.full is not None
        return self.passes.update_full(
            weight,
            gradient,
            self._scale,
            measures.alpha / measures.clip_ratio,
            state.full.view(-1),
            beta2=self._beta2,
            eps1=self._added_eps1,
            floor=self._floor,
            bound=self._bound,
            keep=self._keep(measures.alpha),
            momentum=None if state.momentum is None else state.momentum.view(-1),
            beta1=self.settings.beta1 or 0.0,
        )

    def _apply_factored(
        self, weight: Tensor, gradient: Tensor, state: State, factors: _Factors, measures: Measures
    ) -> float:
        assert state.row is not None
        assert state.column is not None
        layout, momentum = self.layout, state.momentum
        weight_BNM = layout.as_matrices(weight)
        momentum_BNM = None if momentum is None else layout.as_matrices(momentum)
        squared_sum = self.passes.update(
            weight_BNM,
            layout.as_matrices(gradient),
            self._scale,
            measures.alpha / measures.clip_ratio,
            factors.inverse_row_BN,
            factors.inverse_column_BM,
            cap=self._cap(factors),
            keep=self._keep(measures.alpha),
            momentum_BNM=momentum_BNM,
            beta1=self.settings.beta1 or 0.0,
        )
        layout.restore(weight_BNM, weight)
        if momentum_BNM is not None and momentum is not None:
            layout.restore(momentum_BNM, momentum)
        layout.restore_factor(factors.row_BN, state.row, row=True)
        layout.restore_factor(factors.column_BM, state.column, row=False)
        return squared_sum


def _partial(
    weight_squared_sum: float, long_BK: Tensor, squares_BK: Tensor, ratios_BK: Tensor
) -> Partial:
    return Partial(
        weight_squared_sum=weight_squared_sum,
        update_squared_sum=0.0,
        least=_least(long_BK),
        squares=squares_BK.cpu(),
        ratios=ratios_BK.cpu(),
    )


def _least(moment: Tensor) -> float:
    return float(moment.min()) if moment.numel() else math.inf
