"""Sums over workers of elements in int8, compiled: read as they came, in one pass over the bytes.

As in `cpu.py`, the bits are the same on every machine: no fastmath, no contraction.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from adashard_server.optim.blocks import BLOCK_ELEMENTS

Array = NDArray[np.float32]

_SCALE_BYTES = 4

_compiled = numba.njit(nogil=True, error_model="numpy", cache=True)


@_compiled
def accumulate_blocks(
    total: Array, blocks: NDArray[np.uint8], share: np.float32, first: bool
) -> None:
    """Adds `share` times elements in int8 to `total`, or puts them there; flat, in place.

    What a byte stands for is byte times scale, rounded to float32; times `share`, rounded again.

    Args:
        total: of as many elements as `blocks` has; written.
        blocks: as `optim/blocks.py` says that they lie.
        share: how much they count.
        first: whether they take the place of what is in `total`.
    """
    bits = np.empty(_SCALE_BYTES, np.uint8)  # aligned, which those of a block need not be
    scales = bits.view(np.float32)
    place = 0
    for start in range(0, total.size, BLOCK_ELEMENTS):
        part = total[start : start + BLOCK_ELEMENTS]
        bits[:] = blocks[place : place + _SCALE_BYTES]
        place += _SCALE_BYTES
        levels = blocks[place : place + part.size].view(np.int8)
        place += part.size
        scale = scales[0]
        if first:
            for at in range(part.size):
                part[at] = (np.float32(levels[at]) * scale) * share
        else:
            for at in range(part.size):
                part[at] += (np.float32(levels[at]) * scale) * share
