"""Loss scaling for float16 that keeps nobody waiting."""

from __future__ import annotations

from typing import Any

import torch

from adashard.optimizer import RemoteOptimizer


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler`, for a worker that is not alone.

    Where gradients have overflowed, torch's does not call `step()`: the other workers of the job
    wait until this one has come round to its next attempt. This one calls `skip_step()` there.
    To optimizers that are not adashard's it does what torch's does.
    """

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        *args: Any,  # noqa: ANN401 - as in torch
        **kwargs: Any,  # noqa: ANN401
    ) -> float | None:
        """Unscales the gradients and steps, or takes part in the step without a gradient.

        Args:
            optimizer: whose step it is.
            *args: passed on to `optimizer.step()`.
            **kwargs: passed on as well.

        Returns:
            What `optimizer.step()` has returned; None where it was left out.

        Raises:
            AdashardError: as `RemoteOptimizer.step` does.
        """
        stepped: list[bool] = []
        hook = optimizer.register_step_pre_hook(lambda *_: stepped.append(True))
        try:
            result = super().step(optimizer, *args, **kwargs)
        finally:
            hook.remove()
        if not stepped and isinstance(optimizer, RemoteOptimizer):
            optimizer.skip_step()
        return result
