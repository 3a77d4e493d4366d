"""Tensors as bytes: element formats, and views without copies in both directions."""

from __future__ import annotations

import warnings
from typing import cast

import numpy as np
import torch
from torch import Tensor

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


def flat_on_cpu(tensor: Tensor) -> Tensor:
    """`tensor` in row-major order on the CPU, flat; a view where that is possible."""
    return flat_view(tensor.detach().contiguous().cpu())


def flat_view(tensor: Tensor) -> Tensor:
    """A contiguous tensor, flat, over the same memory.

    torch calls one of a single element contiguous whatever its strides are; here it has stride 1,
    as `as_buffer` needs it.
    """
    return tensor.as_strided((tensor.numel(),), (1,))


# torch warns once a process about tensors over read-only memory; ours are never written to.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(np.zeros(1, np.float32).tobytes(), dtype=torch.float32)
