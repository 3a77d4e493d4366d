"""In which formats one push's gradients travel, and how fast they went."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adashard.feedback import Feedback, part_of
from adashard.link_speed import LinkMeter
from adashard.quantize import narrowed, quantized
from adashard.rows import is_sparse, values_within
from adashard.wire.placement import Slice
from adashard.wire.spec import DType
from adashard.wire.tensors import torch_dtype, wire_dtype

_BITS = {
    DType.FLOAT64: 64,
    DType.FLOAT32: 32,
    DType.BFLOAT16: 16,
    DType.FLOAT16: 16,
    DType.INT8: 8,
}


class Encoding:
    """How one push's gradients become bytes: the same ones, however often it is repeated.

    Its streams call it from threads of their own, each for other slices.

    Args:
        dtype: the format that is asked for; None for that of each gradient. One that is as
            narrow, or narrower, travels as it is. Rows of a sparse gradient travel as bfloat16
            where int8 is asked for: other rows come in the next step, and a residual would wait.
        feedback: keeps what int8 takes away; needed for that.
        meter: is told of what has gone out.
    """

    def __init__(
        self,
        dtype: DType | None = None,
        *,
        feedback: Feedback | None = None,
        meter: LinkMeter | None = None,
    ) -> None:
        self.meter = meter
        self._dtype = dtype
        self._feedback = feedback
        self._push = feedback.begin() if feedback else 0

    def dtype_of(self, gradient: Tensor) -> DType:
        """The format in which a gradient travels."""
        own, asked = wire_dtype(gradient.dtype), self._dtype
        if asked is DType.INT8 and is_sparse(gradient):
            asked = DType.BFLOAT16
        return own if asked is None or _BITS[asked] >= _BITS[own] else asked

    def part(self, gradient: Tensor, piece: Slice) -> Tensor:
        """What of a gradient goes out for a slice, not yet in the format that it travels in.

        A view, in the slice's shape; for rows (touched rows, ...); for int8 flat, with what
        earlier pushes have left in it.
        """
        if is_sparse(gradient):
            return values_within(gradient, piece)
        part = part_of(gradient, piece)
        if self.dtype_of(gradient) is not DType.INT8:
            return part
        assert self._feedback is not None
        return self._feedback.to_send(self._push, piece, part)

    def end(self, gradients: Mapping[int, Tensor], *, used: bool) -> None:
        """The push is over.

        Args:
            gradients: by parameter, as they were pushed.
            used: whether the step was taken with them.
        """
        if self._feedback is not None:
            self._feedback.end(self._push, gradients, used=used)


def encoded(part: Tensor, dtype: DType) -> Tensor:
    """Elements of `Encoding.part` in a narrower format: a new tensor, with int8 of bytes."""
    return quantized(part) if dtype is DType.INT8 else narrowed(part, torch_dtype(dtype))
