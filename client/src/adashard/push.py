"""What a worker gives to a step, and how it wants the weights back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adashard.encoding import Encoding
from adashard.wire.bits import bits_of
from adashard.wire.messages import GroupStep
from adashard.wire.spec import Rounding

_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """One gradient of the whole model; unchanged until its step is taken.

    Attributes:
        gradients: by parameter index; those without one are absent.
        not_finite: parameters whose gradients have NaN or Inf in them. Then nothing is sent of
            any, and the job skips the step.
        settings: makes the settings of each group from the parameters' step counts so far.
        share: how much it counts in the mean.
        max_grad_norm: bound of the norm of the mean over the whole model; None for none.
        encoding: the formats that gradients travel in.
    """

    gradients: Mapping[int, Tensor]
    settings: Callable[[tuple[int, ...]], tuple[GroupStep, ...]]
    share: float = 1.0
    max_grad_norm: float | None = None
    not_finite: tuple[int, ...] = ()
    encoding: Encoding = field(default_factory=Encoding)

    def present(self, count: int) -> bytes:
        """One bit per parameter, least significant first."""
        return bits_of(self.gradients, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """How weights are wanted back.

    Attributes:
        dtype: their format on the wire; None for that of each parameter.
        rounding: how they are rounded where that is below float32.
        seed: key of stochastic rounding.
        keep_masters: whether weights that are rounded come whole, in float32, and are kept so
            beside the parameters.
    """

    dtype: torch.dtype | None = None
    rounding: Rounding = Rounding.NEAREST
    seed: int = 0
    keep_masters: bool = False

    def wanted(self, parameter: Tensor) -> torch.dtype:
        """The format in which a parameter's weights travel to the worker."""
        if self.keeps_master(parameter):
            return torch.float32
        return parameter.dtype if self.dtype is None else self.dtype

    def keeps_master(self, parameter: Tensor) -> bool:
        """Whether float32 weights are kept beside a parameter, which has them rounded."""
        return self.keep_masters and self.rounded_to(parameter) is not None

    def rounded_to(self, parameter: Tensor) -> torch.dtype | None:
        """The coarsest format below float32 that a parameter's weights pass through, if any."""
        passed = [one for one in (self.dtype, parameter.dtype) if one in _NARROW]
        return max(passed, key=lambda dtype: torch.finfo(dtype).eps, default=None)
