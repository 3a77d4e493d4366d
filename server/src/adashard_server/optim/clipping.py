"""Root mean squares of whole tensors, and the clipping of updates by them.

RMS(X) = sqrt(mean of X_ij^2) is how Adafactor measures both a parameter and its update.

References:
    Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018,
    Algorithm 4: alpha_t holds RMS(X), U^_t holds RMS(U).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def squared_sum(tensor: Tensor) -> float:
    """Sum of the squares of all elements, added in float64; 0 for an empty tensor.

    In float32 torch's norm loses 1e-3 of 16 million elements, and squares leave the range
    of the format long before their elements do.
    """
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def root_mean_square(squared_sum: float, element_count: int) -> float:
    """RMS of `element_count` elements whose squares add up to `squared_sum`; 0 for none."""
    return math.sqrt(squared_sum / max(1, element_count))


def clip_ratio(rms: float, threshold: float) -> float:
    """max(1, RMS(U) / d): what an update of this RMS is divided by, never less than 1.

    Args:
        rms: of the update before clipping.
        threshold: d, above 0; infinity clips nothing.
    """
    return max(1.0, rms / threshold)
