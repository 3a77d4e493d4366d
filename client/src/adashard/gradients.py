"""The gradients that a step finds on the parameters, and whether they are fit to be sent.

That is found out before the first byte, by a pass of its own over every gradient: once a frame is
out, a push is one gradient for ever, and what is found while frames are packed is found too late.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from adashard.rows import coalesced_rows, is_sparse
from adashard.wire.errors import NotFinite

NAMED_MAX = 3
"""Tensors that a message names before it counts the rest."""


def gathered(parameters: Iterable[tuple[str, Tensor]]) -> dict[int, Tensor]:
    """The gradients there are, by the place of their parameter; those in rows, coalesced.

    Args:
        parameters: names and tensors, in registration order; not changed.

    Raises:
        InvalidGradient: one is sparse in more than rows, or has a row that the parameter has not.
    """
    found: dict[int, Tensor] = {}
    for index, (name, parameter) in enumerate(parameters):
        gradient = parameter.grad
        if gradient is not None:
            dense = gradient.layout is torch.strided
            found[index] = gradient if dense else coalesced_rows(name, gradient)
    return found


def not_finite(gradients: Mapping[int, Tensor]) -> tuple[int, ...]:
    """The parameters whose gradients hold NaN or Inf, ascending.

    One read of memory and no temporary of a gradient's size; each device is waited for once.

    Args:
        gradients: by parameter, dense or coalesced in rows, in any format and on any device.
    """
    verdicts: dict[torch.device, dict[int, Tensor]] = {}
    for index, gradient in gradients.items():
        values = gradient.values() if is_sparse(gradient) else gradient
        if values.numel():  # else no row was touched
            verdicts.setdefault(values.device, {})[index] = _finite(values)
    return tuple(
        sorted(
            index
            for on_device in verdicts.values()
            for index, finite in zip(
                on_device, torch.stack(list(on_device.values())).tolist(), strict=True
            )
            if not finite
        )
    )


def refusal(names: Sequence[str], *, worker: str, step: int, job: str) -> NotFinite:
    """What a worker raises instead of sending gradients that are not finite.

    Args:
        names: of the parameters whose gradients they are.
        worker: its id.
        step: that they would have been for.
        job: name of the job.
    """
    return NotFinite(
        f"NaN or Inf in the gradient of {listed(names)} (worker {worker}, step {step} of job "
        f"{job!r}); nothing was sent, and the weights are untouched",
        tensors=", ".join(map(repr, names[:NAMED_MAX])),
        worker=worker,
        step=step,
    )


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return ", ".join(map(repr, names[:NAMED_MAX])) + more


def _finite(values: Tensor) -> Tensor:
    """Whether every element is finite: a bool on the values' device, not waited for."""
    least, greatest = torch.aminmax(values)  # both are NaN if an element is
    return torch.isfinite(least) & torch.isfinite(greatest)
