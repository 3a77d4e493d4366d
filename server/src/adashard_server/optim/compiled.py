"""The passes of `passes.py` on a CPU: the loops of `kernels/cpu.py`, called with tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adashard_server.optim.kernels import blocks, cpu
from adashard_server.optim.passes import Passes

_NONE = np.empty(0, np.float32)
_f32 = np.float32


class CompiledPasses(Passes):
    """See `Passes`; tensors are float32, contiguous, on the CPU. Drops the GIL in every loop."""

    @staticmethod
    def square_sum(matrix_NM: Tensor, scale: float = 1.0) -> float:
        """See `Passes.square_sum`."""
        return float(cpu.square_sum(matrix_NM.numpy(), _f32(scale)))

    @staticmethod
    def rows_first(
        gradient_BNM: Tensor,
        scale: float,
        row_BN: Tensor,
        row_new_BN: Tensor,
        squares_BM: Tensor,
        ratios_BM: Tensor,
        *,
        beta2: float,
        eps1: float,
        bound: float,
    ) -> float:
        """See `Passes.rows_first`."""
        return float(
            cpu.rows_first(
                gradient_BNM.numpy(),
                _f32(scale),
                row_BN.numpy(),
                beta2,
                eps1,
                _f32(bound),
                row_new_BN.numpy(),
                squares_BM.numpy(),
                ratios_BM.numpy(),
            )
        )

    @staticmethod
    def columns_first(
        gradient_BNM: Tensor,
        scale: float,
        column_BM: Tensor,
        column_new_BM: Tensor,
        squares_BN: Tensor,
        ratios_BN: Tensor,
        *,
        beta2: float,
        eps1: float,
        bound: float,
    ) -> float:
        """See `Passes.columns_first`."""
        return float(
            cpu.columns_first(
                gradient_BNM.numpy(),
                _f32(scale),
                column_BM.numpy(),
                beta2,
                eps1,
                _f32(bound),
                column_new_BM.numpy(),
                squares_BN.numpy(),
                ratios_BN.numpy(),
            )
        )

    @staticmethod
    def decay(
        moment_BK: Tensor, squares_BK: Tensor, *, beta2: float, count: int, eps1: float, out: Tensor
    ) -> None:
        """See `Passes.decay`."""
        cpu.decay(_flat(moment_BK), _flat(squares_BK), beta2, count, eps1, _flat(out))

    @staticmethod
    def means(moment_BK: Tensor, floor: float) -> Tensor:
        """See `Passes.means`."""
        out = torch.empty(moment_BK.shape[0], dtype=torch.float64)
        cpu.means(moment_BK.numpy(), floor, out.numpy())
        return out

    @staticmethod
    def quotient_sum(ratios_BK: Tensor, moment_BK: Tensor, numerators_B: Tensor) -> float:
        """See `Passes.quotient_sum`."""
        arrays = ratios_BK.numpy(), moment_BK.numpy(), numerators_B.numpy()
        return float(cpu.quotient_sum(*arrays))

    @staticmethod
    def inverse_roots(moment_BK: Tensor, numerators_B: Tensor) -> Tensor:
        """See `Passes.inverse_roots`."""
        out = torch.empty_like(moment_BK)
        cpu.inverse_roots(moment_BK.numpy(), numerators_B.numpy(), out.numpy())
        return out

    @staticmethod
    def update(
        weight_BNM: Tensor,
        gradient_BNM: Tensor,
        scale: float,
        step: float,
        row_BN: Tensor,
        column_BM: Tensor,
        *,
        cap: float,
        keep: float,
        momentum_BNM: Tensor | None,
        beta1: float,
    ) -> float:
        """See `Passes.update`."""
        arguments = (
            weight_BNM.numpy(),
            gradient_BNM.numpy(),
            _f32(scale),
            _f32(step),
            row_BN.numpy(),
            column_BM.numpy(),
            _f32(cap),
            _f32(keep),
        )
        if momentum_BNM is None:
            return float(cpu.update(*arguments))
        return float(cpu.update_with_momentum(*arguments, momentum_BNM.numpy(), _f32(beta1)))

    @staticmethod
    def capped_square_sum(
        gradient_BNM: Tensor, scale: float, row_BN: Tensor, column_BM: Tensor, cap: float
    ) -> float:
        """See `Passes.capped_square_sum`."""
        arrays = row_BN.numpy(), column_BM.numpy()
        return float(cpu.capped_square_sum(gradient_BNM.numpy(), _f32(scale), *arrays, _f32(cap)))

    @staticmethod
    def full_square_sum(
        gradient: Tensor,
        scale: float,
        moment: Tensor,
        *,
        beta2: float,
        eps1: float,
        floor: float,
        bound: float,
    ) -> float:
        """See `Passes.full_square_sum`."""
        scalars = _f32(beta2), _f32(eps1), _f32(floor), _f32(bound)
        return float(cpu.full_square_sum(gradient.numpy(), _f32(scale), moment.numpy(), *scalars))

    @staticmethod
    def update_full(
        weight: Tensor,
        gradient: Tensor,
        scale: float,
        step: float,
        moment: Tensor,
        *,
        beta2: float,
        eps1: float,
        floor: float,
        bound: float,
        keep: float,
        momentum: Tensor | None,
        beta1: float,
    ) -> float:
        """See `Passes.update_full`."""
        scalars = _f32(beta2), _f32(eps1), _f32(floor), _f32(bound), _f32(keep)
        return float(
            cpu.update_full(
                weight.numpy(),
                gradient.numpy(),
                _f32(scale),
                _f32(step),
                moment.numpy(),
                *scalars,
                _NONE if momentum is None else momentum.numpy(),
                _f32(beta1),
            )
        )

    @staticmethod
    def accumulate(total: Tensor, addend: Tensor, share: float, *, first: bool) -> None:
        """See `Passes.accumulate`; narrower formats are widened first, which is exact.

        Blocks of int8 are read as they are (`blocks.py`).
        """
        if addend.dtype is torch.uint8:
            blocks.accumulate_blocks(total.numpy(), addend.numpy(), _f32(share), first)
        else:
            cpu.accumulate(total.numpy(), addend.to(torch.float32).numpy(), _f32(share), first)


def _flat(tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return tensor.view(-1).numpy()
