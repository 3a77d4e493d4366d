"""What a worker gives to a step, and how it wants the weights back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adashard.wire.messages import GroupStep
from adashard.wire.spec import Rounding

_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """One gradient of the whole model; unchanged until its step is taken.

    Attributes:
        gradients: by parameter index; those without one are absent.
        settings: makes the settings of each group from the parameters' step counts so far.
        share: how much it counts in the mean.
        max_grad_norm: bound of the norm of the mean over the whole model; None for none.
    """

    gradients: Mapping[int, Tensor]
    settings: Callable[[tuple[int, ...]], tuple[GroupStep, ...]]
    share: float = 1.0
    max_grad_norm: float | None = None

    def present(self, count: int) -> bytes:
        """One bit per parameter, least significant first."""
        bits = sum(1 << index for index in self.gradients)
        return bits.to_bytes((count + 7) // 8, "little")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """How weights are wanted back.

    Attributes:
        dtype: their format on the wire; None for that of each parameter.
        rounding: how they are rounded where that is below float32.
        seed: key of stochastic rounding.
    """

    dtype: torch.dtype | None = None
    rounding: Rounding = Rounding.NEAREST
    seed: int = 0

    def rounded_to(self, parameter: Tensor) -> torch.dtype | None:
        """The coarsest format below float32 that a parameter's weights pass through, if any."""
        passed = [one for one in (self.dtype, parameter.dtype) if one in _NARROW]
        return max(passed, key=lambda dtype: torch.finfo(dtype).eps, default=None)
