"""Two optimizers for one and the same transport: torch's Adafactor, and the loops of our shards.

With both behind a peer's parameter server, the gap to adashard splits into what the transport costs
and what the optimizer does. Each takes one gradient for each weight and steps in the calling
thread, in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from adashard import schedule
from adashard_server.optim.adafactor import Settings, State, new_state
from adashard_server.optim.compiled import CompiledPasses
from adashard_server.optim.factored import Axes
from adashard_server.optim.layout import Layout
from adashard_server.optim.split import SliceStep

SETTINGS = Settings(
    eps1=1e-30,
    eps2=1e-3,
    clip_threshold=1.0,
    beta1=None,
    weight_decay=0.0,
    weight_decay_mode="alpha",
    scale_parameter=True,
    lr=0.0,
    clamp_eps=False,
)
"""Those of the paper, which are adashard's defaults."""


class Optimizer(Protocol):
    """What a peer's parameter server needs of either."""

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Takes a step with one gradient for each weight, in place on the weights."""


def axes_of(shape: Sequence[int]) -> Axes | None:
    """The factored axes of a parameter: its last two, as in torch and in the paper."""
    return Axes(len(shape) - 2, len(shape) - 1) if len(shape) >= 2 else None


class TorchForeach:
    """`torch.optim.Adafactor(foreach=True)`: the fastest form that torch has on a CPU."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._parameters = [torch.nn.Parameter(weight) for weight in weights]
        self._optimizer = torch.optim.Adafactor(self._parameters, foreach=True)

    def step(self, gradients: Sequence[Tensor]) -> None:
        """See `Optimizer.step`."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()


class OurKernel:
    """Both passes of a shard over whole parameters, one after the other."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._count = 0
        self._held = [_Held(weight) for weight in weights]

    def step(self, gradients: Sequence[Tensor]) -> None:
        """See `Optimizer.step`."""
        self._count += 1
        beta2 = schedule.beta2(self._count, -0.8)
        rho = schedule.rho(self._count, lr=None, relative_step=True, warmup_init=False)
        for held, gradient in zip(self._held, gradients, strict=True):
            held.step(gradient.view(-1), beta2, rho)


class _Held:
    """A parameter as a shard holds it that has all of it in one slice."""

    def __init__(self, weight: Tensor) -> None:
        axes = axes_of(weight.shape)
        self._layout = Layout(weight.shape, weight.shape, axes, None)
        self._weight = weight.view(-1)
        self._state: State = new_state(weight.shape, axes, momentum=False)
        rows = self._weight.view(-1, self._layout.matrices[2])
        self._squared_sum = CompiledPasses.square_sum(rows)

    def step(self, gradient: Tensor, beta2: float, rho: float) -> None:
        step = SliceStep(self._layout, SETTINGS, beta2=beta2, scale=1.0, passes=CompiledPasses)
        measured = step.measure(gradient, self._state, self._squared_sum)
        assert math.isfinite(measured.gradient_squared_sum)
        _, self._squared_sum = step.apply(
            self._weight,
            gradient,
            self._state,
            measured,
            measured.partial,
            measured.short,
            rho=rho,
        )


OPTIMIZERS: dict[str, type[TorchForeach] | type[OurKernel]] = {
    "torch": TorchForeach,
    "ours": OurKernel,
}
"""By the name that scripts call them."""
