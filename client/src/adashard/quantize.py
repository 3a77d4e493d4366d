"""Gradients in fewer bits: rounded to half floats, or to int8 in blocks with a scale each.

Both are plain torch, on whatever device the gradient is; every operation is IEEE's and by itself,
so the same elements become the same bits wherever they are cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adashard.wire.blocks import BLOCK_ELEMENTS, SCALE_BYTES, bytes_of

LEVELS = 127
"""The largest absolute value of a byte; -128 is not used, so that signs are alike."""

_SCALE_MAX = 2.679e36  # so that the largest level of it is finite
_CHUNK = 512 * BLOCK_ELEMENTS  # worked on at once: 2 MiB, and as much beside it


def narrowed(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor in `dtype`, rounded to nearest; what is too large becomes the largest finite.

    So no sum has an infinity in it that no worker's gradient had. A gradient that is infinite
    itself has been refused before.
    """
    greatest = torch.finfo(dtype).max
    return part.clamp(-greatest, greatest).to(dtype, memory_format=torch.contiguous_format)


def quantized(values: Tensor) -> Tensor:
    """int8 in blocks, as it travels: flat uint8, on the same device.

    The scale of a block is its largest absolute value / 127; an element becomes the nearest
    multiple of it, halves the even one. A block of zeros, or of numbers so small that the scale is
    none, becomes zeros.

    Args:
        values: flat, float32, finite, from the border of a block on; not changed.
    """
    out = torch.empty(bytes_of(values.numel()), dtype=torch.uint8, device=values.device)
    place = 0
    for chunk_BK in _chunks(values):
        blocks = chunk_BK.shape[0]
        width = SCALE_BYTES + chunk_BK.shape[1]
        out_BY = out[place : place + blocks * width].view(blocks, width)
        place += blocks * width
        scales_B1, levels_BK = _levels(chunk_BK)
        out_BY[:, :SCALE_BYTES] = scales_B1.view(torch.uint8)
        out_BY[:, SCALE_BYTES:] = levels_BK.to(torch.int8).view(torch.uint8)
    return out


def subtract_quantized(values: Tensor) -> None:
    """Takes from values what `quantized` makes of them; in place. What is left is exact."""
    for chunk_BK in _chunks(values):
        scales_B1, levels_BK = _levels(chunk_BK)
        chunk_BK.sub_(levels_BK.mul_(scales_B1))


def _chunks(values: Tensor) -> list[Tensor]:
    """Views of blocks by elements, the last shorter block by itself."""
    whole = values.numel() // BLOCK_ELEMENTS * BLOCK_ELEMENTS
    parts = [
        values[start : min(start + _CHUNK, whole)].view(-1, BLOCK_ELEMENTS)
        for start in range(0, whole, _CHUNK)
    ]
    if whole < values.numel():
        parts.append(values[whole:].view(1, -1))
    return parts


def _levels(values_BK: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of each block, and a new tensor of whole numbers from -127 to 127, in float32."""
    least_B1 = values_BK.amin(dim=1, keepdim=True)
    greatest_B1 = values_BK.amax(dim=1, keepdim=True)
    largest_B1 = torch.maximum(greatest_B1, least_B1.neg_()).abs_()  # of -0 too, which is no scale
    scales_B1 = largest_B1.div_(LEVELS).clamp_(max=_SCALE_MAX)
    divisors_B1 = scales_B1.masked_fill(scales_B1 == 0, torch.inf)
    levels_BK = torch.div(values_BK, divisors_B1).round_().clamp_(-LEVELS, LEVELS)
    return scales_B1, levels_BK
