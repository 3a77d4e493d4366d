"""Elements in int8 as they lie in an addend: blocks of up to 1024, each behind its scale.

An addend in this format is a flat tensor of uint8: for each block the four bytes of a float32, the
scale, then a signed byte for each element. Only the last block may be shorter. What a byte stands
for is byte times scale, rounded to float32. `compiled.py` reads it without this copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1024
"""Behind one scale; part of the contract of the wire, which knows it by the same name."""

_BLOCK_BYTES = torch.float32.itemsize + BLOCK_ELEMENTS


def decoded(blocks: Tensor, count: int) -> Tensor:
    """The elements of an addend in blocks: a new flat float32 tensor on the same device.

    Args:
        blocks: flat, uint8; not changed.
        count: how many elements there are.
    """
    whole, rest = divmod(count, BLOCK_ELEMENTS)
    border = whole * _BLOCK_BYTES
    parts = [_values(blocks[:border].view(whole, _BLOCK_BYTES))]
    if rest:
        parts.append(_values(blocks[border:].view(1, -1)))
    return torch.cat(parts)


def _values(blocks_BY: Tensor) -> Tensor:
    scale_bytes = torch.float32.itemsize
    bits_B4 = blocks_BY[:, :scale_bytes].clone(memory_format=torch.contiguous_format)
    levels_BK = blocks_BY[:, scale_bytes:].view(torch.int8)
    return (levels_BK.to(torch.float32) * bits_B4.view(torch.float32)).reshape(-1)
