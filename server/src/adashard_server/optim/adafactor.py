"""Adafactor: one parameter, one step. The readable reference that all faster code is held to.

Shape suffixes: N and M are the two factored axes, wherever they lie (`factored.py`); all others
are batch axes and left out of the names. Weight and gradient have all axes.

The algorithm, for step t of this parameter, in the paper's letters (X weight, G gradient):

    alpha_t = max(eps2, RMS(X_{t-1})) rho_t              `_step_size`
    R_t     = beta2_t R_{t-1} + (1 - beta2_t) row means of (G_t^2 + eps1)
    C_t     = the same of the columns                    `_decay_second_moment`
    V_t     = R_t C_t / mean(R_t)
    U_t     = G_t / sqrt(V_t)                            `_inverse_root`
    U^_t    = U_t / max(1, RMS(U_t) / d)                 `clipping.clip_ratio`
    X_t     = X_{t-1} - alpha_t U^_t

Vectors, scalars, and what else is not factored keep V_t itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adashard_server.optim import clipping, factored
from adashard_server.optim.factored import Axes

STATE_ITEM_BYTES = torch.float32.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Hyper-parameters of one step, resolved: no defaults, nothing that depends on time.

    Attributes:
        eps1: regularises the squared gradient; 0 or more.
        eps2: lower bound of RMS(X) in the step size; 0 or more.
        clip_threshold: d, above 0; infinity clips nothing.
        beta1: decay of the first moment, in [0, 1); None without one, as in the state.
        weight_decay: 0 or more.
        weight_decay_mode: the weight is decayed by `weight_decay` times alpha_t, times `lr`, or
            plainly.
        scale_parameter: whether the step size is relative to RMS(X); otherwise it is rho_t.
        lr: what `weight_decay_mode="lr"` multiplies with; rho_t is given apart.
        clamp_eps: torch's placement of eps1. It is not added to the squared gradient, but bounds
            mean(R) and sqrt(V) from below. The paper's is False.
    """

    eps1: float
    eps2: float
    clip_threshold: float
    beta1: float | None
    weight_decay: float
    weight_decay_mode: Literal["alpha", "lr", "plain"]
    scale_parameter: bool
    lr: float
    clamp_eps: bool


@dataclass(slots=True)
class State:
    """What Adafactor remembers of a parameter between steps; `step` writes it in place.

    Either `row` and `column` or `full` is there. All have the weight's dtype and device: float32
    in service, float64 where tests ask for it.

    Attributes:
        row: R, row means of the squared gradient: the parameter's shape without its column axis.
        column: C, column means: the shape without the row axis.
        full: V, the second moment itself, where it is not factored.
        momentum: the first moment of the scaled update, where there is one.
    """

    row: Tensor | None
    column: Tensor | None
    full: Tensor | None
    momentum: Tensor | None

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes held, by kind as in `state_bytes`; counted off the tensors."""
        kinds = {
            "row": self.row,
            "column": self.column,
            "vector": self.full,
            "momentum": self.momentum,
        }
        return {kind: tensor.nbytes for kind, tensor in kinds.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class Measures:
    """What a step did, for people.

    Attributes:
        update_squared_sum: of U_t, before clipping.
        clip_ratio: what clipping divided U_t by; 1 where it did nothing.
        alpha: the step size alpha_t, before any division by `clip_ratio`.
    """

    update_squared_sum: float
    clip_ratio: float
    alpha: float


def new_state(
    shape: Sequence[int],
    axes: Axes | None,
    *,
    momentum: bool,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> State:
    """The state of a parameter that has not taken a step: all zero, in memory of its own.

    Args:
        shape: of the parameter.
        axes: as `factored_axes` chose them; None keeps the full second moment.
        momentum: whether a first moment is kept.
        device: the weight's.
        dtype: the weight's.
    """
    tensors = {
        kind: torch.zeros(kind_shape, dtype=dtype, device=device)
        for kind, kind_shape in state_shapes(shape, axes, momentum=momentum).items()
    }
    return State(
        row=tensors.get("row"),
        column=tensors.get("column"),
        full=tensors.get("vector"),
        momentum=tensors.get("momentum"),
    )


def state_bytes(shape: Sequence[int], axes: Axes | None, *, momentum: bool) -> dict[str, int]:
    """Bytes of a parameter's float32 state by kind, from shapes alone.

    Kinds are "row", "column", "vector" (the full second moment, of any shape) and "momentum";
    those that the state does not have are left out.
    """
    shapes = state_shapes(shape, axes, momentum=momentum)
    return {kind: STATE_ITEM_BYTES * math.prod(sizes) for kind, sizes in shapes.items()}


@torch.no_grad()
def step(
    weight: Tensor,
    gradient: Tensor,
    state: State,
    axes: Axes | None,
    settings: Settings,
    *,
    beta2: float,
    rho: float,
) -> Measures:
    """Takes one step of Adafactor with one whole parameter, in place.

    Not thread-safe for the same tensors, and not idempotent. The result's bits depend on the
    arguments and on torch's number of threads. An element whose second moment is 0 stays where
    it is, so gradients of 0 never give NaN; nor do any others that are finite.

    Args:
        weight: X, any shape, float32; becomes X_t.
        gradient: G, same shape, dtype and device: the mean over workers, taken before squaring,
            since squares do not add. Not modified.
        state: as by `new_state` for the same shape and axes; becomes that of step t.
        axes: the factored axes; None where the state has the full second moment.
        settings: `beta1` is None exactly where the state has no momentum.
        beta2: weight of the old second moment, in [0, 1); 0 at step 1, so that no bias
            is there to be corrected.
        rho: the relative step size, or the learning rate where the step is not relative.

    References:
        Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018:
        Algorithm 4 (matrices), Algorithm 5 (vectors and scalars), Algorithm 6 (the defaults, and
        the schedules of beta2 and rho, which `adashard.schedule` computes).
        Not in the paper: more than two axes, which share one RMS(X) and one RMS(U); momentum,
        a moving average of the scaled update as in fairseq and transformers; weight decay,
        decoupled (Loshchilov and Hutter, 2019); torch's placement of eps1.
    """
    assert gradient.shape == weight.shape, (gradient.shape, weight.shape)
    assert gradient.dtype == weight.dtype, (gradient.dtype, weight.dtype)
    assert (state.momentum is None) == (settings.beta1 is None), "momentum is there with beta1 only"

    alpha = _step_size(weight, settings, rho)
    _decay_second_moment(state, gradient, axes, settings, beta2)
    update = gradient * _inverse_root(state, axes, _floor(settings, weight.dtype))
    update_squared_sum = clipping.squared_sum(update)
    update_rms = clipping.root_mean_square(update_squared_sum, update.numel())
    clip_ratio = clipping.clip_ratio(update_rms, settings.clip_threshold)
    update.mul_(alpha / clip_ratio)
    if state.momentum is not None and settings.beta1 is not None:
        update = state.momentum.mul_(settings.beta1).add_(update, alpha=1.0 - settings.beta1)
    if settings.weight_decay:
        weight.mul_(1.0 - settings.weight_decay * weight_decay_scale(settings, alpha))
    weight.sub_(update)
    return Measures(update_squared_sum, clip_ratio, alpha)


def _step_size(weight: Tensor, settings: Settings, rho: float) -> float:
    """alpha_t, from the weight before it is decayed or updated."""
    if not settings.scale_parameter:
        return rho
    rms = clipping.root_mean_square(clipping.squared_sum(weight), weight.numel())
    return max(settings.eps2, rms) * rho


def _decay_second_moment(
    state: State, gradient_NM: Tensor, axes: Axes | None, settings: Settings, beta2: float
) -> None:
    """R_t and C_t, or V_t, in place.

    Squares are bounded so that no sum of them overflows: a finite gradient never makes the state
    infinite, and the weights NaN with it. In float32 it binds for gradients above 1e15.
    """
    largest = torch.finfo(gradient_NM.dtype).max / max(1, gradient_NM.numel())
    squared_NM = gradient_NM.square().clamp_(max=largest)
    if not settings.clamp_eps:
        squared_NM.add_(settings.eps1)
    if axes is None:
        assert state.full is not None, "without factored axes the state is the full moment"
        factored.decay(state.full, squared_NM, beta2)
    else:
        assert state.row is not None, "the state of factored axes has row means"
        assert state.column is not None, "the state of factored axes has column means"
        factored.decay(state.row, factored.row_means(squared_NM, axes), beta2)
        factored.decay(state.column, factored.column_means(squared_NM, axes), beta2)


def _inverse_root(state: State, axes: Axes | None, floor: float) -> Tensor:
    """1 / sqrt(V_t) in the parameter's shape, at most 1 / floor."""
    if axes is None:
        assert state.full is not None
        inverse_root_NM = factored.inverse_root(state.full)
    else:
        assert state.row is not None
        assert state.column is not None
        inverse_root_NM = factored.inverse_root_of_product(state.row, state.column, axes, floor)
    return inverse_root_NM.clamp_(max=1.0 / floor)


def _floor(settings: Settings, dtype: torch.dtype) -> float:
    """Lower bound of both mean(R) and sqrt(V).

    It is eps1 in torch's placement. In the paper's it is the smallest normal number, and binds
    only where eps1 is next to nothing.
    """
    smallest = torch.finfo(dtype).tiny
    return max(settings.eps1, smallest) if settings.clamp_eps else smallest


def weight_decay_scale(settings: Settings, alpha: float) -> float:
    """What weight decay is multiplied with before it multiplies the weight."""
    return {"alpha": alpha, "lr": settings.lr, "plain": 1.0}[settings.weight_decay_mode]


def state_shapes(
    shape: Sequence[int], axes: Axes | None, *, momentum: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of the state's tensors by kind: "row", "column", "vector" and "momentum"."""
    shapes: dict[str, tuple[int, ...]] = {}
    if axes is None:
        shapes["vector"] = tuple(shape)
    else:
        shapes["row"] = factored.row_shape(shape, axes)
        shapes["column"] = factored.column_shape(shape, axes)
    if momentum:
        shapes["momentum"] = tuple(shape)
    return shapes
