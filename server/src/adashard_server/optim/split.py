"""One slice of a parameter, one step of Adafactor: what it contributes, and its update.

`adafactor.py` is the step of a whole parameter. Here it comes in two halves with an exchange
between them, so that slices may lie anywhere:

    measure     one pass over the gradient: the long factor, and this slice's partial sums
    (exchange)  partial sums of all slices of the parameter are added: `partials.Partial`
    short       the short factor and RMS(U) from the sums, the same for all slices
    apply       one pass over the weight

The *long* factor is the one that lies along the cut axis: each slice has its part of it alone.
The *short* factor is the same in all slices, and each has all of it. Where no factor lies along
the cut (a slice that is a whole parameter, or whole matrices of a batch, or a moment that is not
factored), a slice knows both factors and RMS(U)^2 without any exchange, and two numbers are left.

docs/adafactor.md derives it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adashard_server.optim import clipping, partials
from adashard_server.optim.adafactor import Measures, Settings, State, weight_decay_scale
from adashard_server.optim.layout import Factor, Layout
from adashard_server.optim.partials import Partial
from adashard_server.optim.passes import Passes

_F32_MAX = torch.finfo(torch.float32).max
_CAP = 1.0 / torch.finfo(torch.float32).tiny  # of 1 / sqrt(V), so that it is finite


@dataclass(frozen=True, slots=True)
class Short:
    """The short factor after a step and what follows from it; not to be written to.

    Attributes:
        means_BK: the factor, in the order of the passes.
        mean_B: its mean for each matrix, which is that of the long factor too; float64.
        inverse_BK: its part of 1 / sqrt(V).
        may_cap: whether the lower bound of sqrt(V) may bind for an element of the parameter.
        update_squared_sum: of U over the parameter; None where it is no product of factors, as
            the bound may bind.
    """

    means_BK: Tensor
    mean_B: Tensor
    inverse_BK: Tensor
    may_cap: bool
    update_squared_sum: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """What the first pass over a slice has found; the state is as it was.

    Attributes:
        gradient_squared_sum: of G; NaN where an element is not finite.
        partial: the slice's part of the sums over its parameter.
        complete_BK: new means of the factor that is complete; None where there are no factors.
        short: the other factor, where no exchange is needed for it.
    """

    gradient_squared_sum: float
    partial: Partial
    complete_BK: Tensor | None = None
    short: Short | None = None


class SliceStep:
    """One step of one slice: settings and scalars that its halves have in common.

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
        squared_sum, complete_BK, partial = self._first_pass(
            gradient_BNM, state, weight_squared_sum
        )
        if self.layout.long is not None:
            return Measured(squared_sum, partial, complete_BK)
        short = self.short(state, partial)
        update_squared_sum = short.update_squared_sum
        if update_squared_sum is None:
            update_squared_sum = self._capped_square_sum(gradient_BNM, complete_BK, short)
        partial = partials.alone(weight_squared_sum, update_squared_sum)
        return Measured(squared_sum, partial, complete_BK, short)

    def _first_pass(
        self, gradient_BNM: Tensor, state: State, weight_squared_sum: float
    ) -> tuple[float, Tensor, Partial]:
        """The sum of G^2, the factor that is complete, and the sums that make the other one."""
        by_columns = self.layout.complete == "column"
        first_pass = self.passes.columns_first if by_columns else self.passes.rows_first
        old_BK = self._means(state, self.layout.complete)
        new_BK = torch.empty_like(old_BK)
        squares_BK = torch.empty_like(self._means(state, self.layout.short))
        ratios_BK = torch.empty_like(squares_BK)
        squared_sum = first_pass(
            gradient_BNM,
            self._scale,
            old_BK,
            new_BK,
            squares_BK,
            ratios_BK,
            beta2=self._beta2,
            eps1=self._added_eps1,
            bound=self._bound,
        )
        partial = Partial(
            weight_squared_sum=weight_squared_sum,
            update_squared_sum=0.0,
            least=self._least(new_BK),
            squares=squares_BK.cpu(),
            ratios=ratios_BK.cpu(),
        )
        return squared_sum, new_BK, partial

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

    def clamped(self, gradient: Tensor, measured: Measured, short: Short) -> float:
        """Sum of U^2 over the slice where the lower bound of V may bind; 0 where it cannot.

        Only for slices with a long factor and eps1 as a bound, which the bilinear form of RMS(U)
        leaves out; all slices of a parameter come to the same answer whether it may bind.
        """
        if not short.may_cap:
            return 0.0
        assert measured.complete_BK is not None
        gradient_BNM = self.layout.as_matrices(gradient)
        return self._capped_square_sum(gradient_BNM, measured.complete_BK, short)

    def _capped_square_sum(self, gradient_BNM: Tensor, complete_BK: Tensor, short: Short) -> float:
        row_BN, column_BM = self._inverse_roots(complete_BK, short)
        return self.passes.capped_square_sum(
            gradient_BNM, self._scale, row_BN, column_BM, self._cap(short)
        )

    # --- between the passes ---------------------------------------------------------------------

    def short(self, state: State, total: Partial) -> Short:
        """The short factor after the step, the same whichever slice of the parameter is asked.

        Args:
            state: of the step before.
            total: sum of the partials of all slices of the parameter.
        """
        old_BK = self._means(state, self.layout.short)
        new_BK = torch.empty_like(old_BK)
        squares_BK = total.squares.view(old_BK.shape).to(old_BK.device)
        self.passes.decay(
            old_BK,
            squares_BK,
            beta2=self._beta2,
            count=self.layout.count,
            eps1=self._added_eps1,
            out=new_BK,
        )
        mean_B = self.passes.means(new_BK, self._floor)
        may_cap = self._may_cap(total.least * self._least(new_BK), mean_B)
        return Short(
            means_BK=new_BK,
            mean_B=mean_B,
            inverse_BK=self._inverse_root(new_BK, self.layout.short, mean_B),
            may_cap=may_cap,
            update_squared_sum=None if may_cap else self._bilinear(total, new_BK, mean_B),
        )

    def _bilinear(self, total: Partial, short_BK: Tensor, mean_B: Tensor) -> float:
        """Sum of U^2 = mean * sum of (sum of G^2 / long) / short, where no bound binds."""
        ratios_BK = total.ratios.view(short_BK.shape).to(short_BK.device)
        return self.passes.quotient_sum(ratios_BK, short_BK, mean_B)

    def _may_cap(self, least: float, mean_B: Tensor) -> bool:
        """Whether the lower bound of sqrt(V) may bind: `least` is R C at least, V that / mean."""
        if not self.settings.clamp_eps:
            return False
        return least < self._floor**2 * max(mean_B.tolist(), default=0.0)

    def _least(self, moment: Tensor) -> float:
        """The least element, where it is asked for: if eps1 is a bound; infinite for none."""
        asked_for = self.settings.clamp_eps and moment.numel()
        return float(moment.min()) if asked_for else math.inf

    def _inverse_roots(self, complete_BK: Tensor, short: Short) -> tuple[Tensor, Tensor]:
        """Row and column factor of 1 / sqrt(V) = sqrt(mean / (R C))."""
        inverse_BK = self._inverse_root(complete_BK, self.layout.complete, short.mean_B)
        if self.layout.complete == "column":
            return short.inverse_BK, inverse_BK
        return inverse_BK, short.inverse_BK

    def _inverse_root(self, means_BK: Tensor, factor: Factor, mean_B: Tensor) -> Tensor:
        """A factor's part of it; the mean over R, which equals that over C, goes to the rows'."""
        numerators_B = mean_B if factor == "row" else torch.ones_like(mean_B)
        return self.passes.inverse_roots(means_BK, numerators_B)

    def _cap(self, short: Short) -> float:
        """Upper bound of 1 / sqrt(V)."""
        return 1.0 / self._floor if short.may_cap else _CAP

    def _means(self, state: State, factor: Factor) -> Tensor:
        """A factor of the step before, as the passes see it."""
        tensor = state.row if factor == "row" else state.column
        assert tensor is not None
        return self.layout.as_means(tensor, factor)

    # --- the second pass ------------------------------------------------------------------------

    def apply(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: State,
        measured: Measured,
        total: Partial,
        short: Short | None,
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
            short: what `short` made of it, or `measured` has; None where there are no factors.
            rho: relative step size, or learning rate.

        Returns:
            What the step did to the whole parameter, and the slice's sum of X^2 after it.
        """
        measures = self._measures(total, short, rho)
        if short is None:
            return measures, self._apply_full(weight, gradient, state, measures)
        assert measured.complete_BK is not None
        squared_sum = self._apply_factored(
            weight, gradient, state.momentum, measured.complete_BK, short, measures
        )
        self._keep_factor(state, self.layout.complete, measured.complete_BK)
        self._keep_factor(state, self.layout.short, short.means_BK)
        return measures, squared_sum

    def _measures(self, total: Partial, short: Short | None, rho: float) -> Measures:
        settings, count = self.settings, self.layout.element_count
        alpha = rho
        if settings.scale_parameter:
            rms = clipping.root_mean_square(total.weight_squared_sum, count)
            alpha = max(settings.eps2, rms) * rho
        update_squared_sum = total.update_squared_sum
        if self.layout.long and short and short.update_squared_sum is not None:
            update_squared_sum = short.update_squared_sum
        rms = clipping.root_mean_square(update_squared_sum, count)
        ratio = clipping.clip_ratio(rms, settings.clip_threshold)
        return Measures(update_squared_sum, ratio, alpha)

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
            keep=self._kept(measures.alpha),
            momentum=None if state.momentum is None else state.momentum.view(-1),
            beta1=self.settings.beta1 or 0.0,
        )

    def _apply_factored(
        self,
        weight: Tensor,
        gradient: Tensor,
        momentum: Tensor | None,
        complete_BK: Tensor,
        short: Short,
        measures: Measures,
    ) -> float:
        layout = self.layout
        weight_BNM = layout.as_matrices(weight)
        momentum_BNM = None if momentum is None else layout.as_matrices(momentum)
        row_BN, column_BM = self._inverse_roots(complete_BK, short)
        squared_sum = self.passes.update(
            weight_BNM,
            layout.as_matrices(gradient),
            self._scale,
            measures.alpha / measures.clip_ratio,
            row_BN,
            column_BM,
            cap=self._cap(short),
            keep=self._kept(measures.alpha),
            momentum_BNM=momentum_BNM,
            beta1=self.settings.beta1 or 0.0,
        )
        layout.restore(weight_BNM, weight)
        if momentum_BNM is not None and momentum is not None:
            layout.restore(momentum_BNM, momentum)
        return squared_sum

    def _kept(self, alpha: float) -> float:
        """What weight decay leaves of a weight."""
        return 1.0 - self.settings.weight_decay * weight_decay_scale(self.settings, alpha)

    def _keep_factor(self, state: State, factor: Factor, means_BK: Tensor) -> None:
        tensor = state.row if factor == "row" else state.column
        assert tensor is not None
        self.layout.restore_means(means_BK, tensor, factor)
