"""Weights on their way to workers of lower precision: rounded so that the mean is exact.

Rounded to nearest, a bfloat16 weight of 1 never moves by steps of 1e-3, as the number next to it is
2^-8 away. Rounded stochastically it moves in one step of four, and on average by what it should.

References:
    Gupta, Agrawal, Gopalakrishnan and Narayanan, Deep Learning with Limited Numerical Precision,
    2015, section 3.2.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adashard_server.optim.kernels import rounding

_LOOPS = {torch.bfloat16: rounding.to_bf16, torch.float16: rounding.to_fp16}
_WORD = 1 << 64


def rounded(
    values: Tensor, dtype: torch.dtype, *, seed: int, slice_index: int, step: int, first: int
) -> Tensor:
    """Each number goes to one of its two neighbours, the nearer the likelier.

    Numbers that `dtype` has stay as they are, and so does what is not finite; beyond the largest
    finite number rounding is to nearest. Drops the GIL. Thread-safe.

    Args:
        values: flat, contiguous, float32, on the CPU: a piece of a slice. Not modified.
        dtype: bfloat16 or float16.
        seed: of the job.
        slice_index: in the job.
        step: that the weights are of.
        first: place of the first value in its slice.

    Returns:
        A new tensor. An element's bits depend on its value, `seed`, `slice_index`, `step` and its
        place in the slice alone: on no worker, machine, or way of cutting the slice into pieces.
    """
    assert values.dtype == torch.float32, values.dtype
    out = torch.empty(values.numel(), dtype=torch.int16)
    key = np.uint64(_key(seed, slice_index, step))
    _LOOPS[dtype](values.numpy().view(np.uint32), key, first, out.numpy().view(np.uint16))
    return out.view(dtype)


def _key(*numbers: int) -> int:
    """A number of 64 bits that begins a sequence of random numbers, another for other numbers."""
    key = 0
    for number in numbers:
        key = int(rounding.random_bits(np.uint64((key + number) % _WORD), 0))
    return key
