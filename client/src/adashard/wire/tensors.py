"""Tensors as bytes: element formats, and views without copies in both directions."""

from __future__ import annotations

import warnings
from typing import cast

import numpy as np
import torch
from torch import Tensor

from adashard.wire import blocks
from adashard.wire.errors import InvalidFrame, UnsupportedParameter
from adashard.wire.spec import DType

_TORCH_DTYPES = {
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
    DType.FLOAT64: torch.float64,
}
_WIRE_DTYPES = {dtype: wire for wire, dtype in _TORCH_DTYPES.items()}


def wire_dtype(dtype: torch.dtype) -> DType:
    """Format of `dtype` on the wire.

    Raises:
        UnsupportedParameter: it is not a floating point format that travels.
    """
    try:
        return _WIRE_DTYPES[dtype]
    except KeyError:
        raise UnsupportedParameter(
            f"{dtype} cannot be trained: only {', '.join(map(str, _WIRE_DTYPES))} can",
            dtype=dtype,
        ) from None


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch format of elements on the wire.

    Raises:
        InvalidFrame: the format is not stated.
    """
    try:
        return _TORCH_DTYPES[dtype]
    except KeyError:
        raise InvalidFrame(f"element format {dtype!r} cannot be read", dtype=dtype) from None


def as_buffer(flat: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied; valid as long as the tensor is."""
    return memoryview(cast(bytes, flat.detach().view(torch.uint8).numpy()))


def row_by_row(part: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order: not copied where they lie so, on the CPU.

    Rows that lie apart are put together by numpy. torch would do that in pages that are new each
    time, and the kernel takes several times as long to bring these as the copy takes.
    """
    if part.is_contiguous() or part.device.type != "cpu" or part.stride(-1) != 1:
        return as_buffer(flat_on_cpu(part))
    return memoryview(part.detach().view(torch.uint8).numpy().tobytes())


def from_buffer(buffer: memoryview, dtype: DType) -> Tensor:
    """A flat tensor over `buffer`, not copied; it must not be written to."""
    if not buffer.nbytes:
        return torch.empty(0, dtype=torch_dtype(dtype))  # frombuffer refuses to make one
    return torch.frombuffer(buffer, dtype=torch_dtype(dtype))


def addend_from(buffer: memoryview, dtype: DType) -> Tensor:
    """The elements of a pushed gradient over `buffer`, not copied, not to be written to.

    Flat, in their format; those of int8 stay in the blocks that they come in (`blocks.py`), as
    bytes of type uint8, which is how the loops that add them want them.

    Raises:
        InvalidFrame: the format is not stated.
    """
    if dtype is not DType.INT8:
        return from_buffer(buffer, dtype)
    return torch.frombuffer(buffer, dtype=torch.uint8) if buffer.nbytes else _NO_BLOCKS


def element_count(addend: Tensor) -> int:
    """How many elements are in what `addend_from` has returned."""
    return blocks.elements_of(addend.numel()) if _in_blocks(addend) else addend.numel()


def without_first(addend: Tensor, count: int) -> Tensor:
    """What `addend_from` has returned without its first `count` elements; a view.

    Raises:
        InvalidFrame: they end inside a block.
    """
    if not _in_blocks(addend):
        return addend[count:]
    if count % blocks.BLOCK_ELEMENTS:
        raise InvalidFrame(f"a gradient in int8 cannot go on {count} elements behind a border")
    return addend[blocks.bytes_of(count) :]


def flat_on_cpu(tensor: Tensor) -> Tensor:
    """`tensor` in row-major order on the CPU, flat; a view where that is possible."""
    return flat_view(tensor.detach().contiguous().cpu())


def flat_view(tensor: Tensor) -> Tensor:
    """A contiguous tensor, flat, over the same memory.

    torch calls one of a single element contiguous whatever its strides are; here it has stride 1,
    as `as_buffer` needs it.
    """
    return tensor.as_strided((tensor.numel(),), (1,))


def _in_blocks(addend: Tensor) -> bool:
    return addend.dtype is torch.uint8


_NO_BLOCKS = torch.empty(0, dtype=torch.uint8)

# torch warns once a process about tensors over read-only memory; ours are never written to.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(np.zeros(1, np.float32).tobytes(), dtype=torch.float32)
