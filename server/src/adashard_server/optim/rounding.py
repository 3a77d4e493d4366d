"""Stochastic rounding; being written."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(
    values: Tensor, dtype: torch.dtype, *, seed: int, slice_index: int, step: int, first: int
) -> Tensor:
    """Being written: rounds to nearest for now."""
    return values.to(dtype)
