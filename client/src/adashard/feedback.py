"""Error feedback: what int8 has taken from a gradient is added to the worker's next one.

For each slice the worker keeps a *residual*: what its gradients have had in them so far that was
not sent. A push adds its gradient to the residual, sends what int8 makes of the sum, and keeps the
rest. So all that was sent is the sum of all gradients but for the newest residual, which is half a
quantum of each element at most.

A push is one gradient for ever (rule W5): repeated, it must be the same bytes. So the sum stays in
the residual's place while its step is taken, and the bytes are made of it as often as they are
asked for. What was sent is taken from it when the slice's next gradient comes. Where a push turns
out not to have been used, its gradient is taken from the sum instead.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adashard.quantize import subtract_quantized
from adashard.wire.placement import Slice

_GREATEST = torch.finfo(torch.float32).max
_NO_PUSH = 0


def part_of(tensor: Tensor, piece: Slice) -> Tensor:
    """The part of a parameter's tensor that a slice is, in its shape; a view."""
    whole = tensor.detach()
    return whole.narrow(piece.axis, piece.start, piece.stop - piece.start) if piece.shape else whole


@dataclass(slots=True)
class _Residual:
    """What is kept of one slice.

    Attributes:
        values: flat, float32, where the gradient is; None before the first.
        push: the push whose sum the values are, what it has sent included; 0 for none.
        lock: two streams of one push may ask for it at once, the older one at its end.
    """

    values: Tensor | None = None
    push: int = _NO_PUSH
    lock: threading.Lock = field(default_factory=threading.Lock)


class Feedback:
    """The residuals of one worker.

    `to_send` may be called by any thread; the rest belongs to one thread. The memory is a float32
    for every element of a parameter that has been pushed in int8, on its gradient's device.
    """

    def __init__(self) -> None:
        self._residuals: dict[Slice, _Residual] = {}
        self._loaded: Mapping[int, Tensor] = {}
        self._begun = _NO_PUSH
        self._open = _NO_PUSH

    def begin(self) -> int:
        """The number of a new push, until `end`."""
        self._begun += 1
        self._open = self._begun
        return self._open

    def to_send(self, push: int, piece: Slice, gradient: Tensor) -> Tensor:
        """What int8 is to be made of: the slice's residual and its gradient; flat, float32.

        Args:
            push: its number.
            piece: the slice.
            gradient: the slice's, in its shape, dense and finite; not changed.

        Returns:
            The sum, not to be written to; it stays until the push ends. For one that has ended,
            whatever is there: its stream is cut off, and nobody reads what it sends.
        """
        residual = self._residuals.setdefault(piece, _Residual())
        with residual.lock:
            if residual.values is None:
                residual.values = self._first(piece, gradient.device)
            if residual.push != push == self._open:
                _settle(residual)
                total = residual.values.view(gradient.shape).add_(gradient)
                total.clamp_(-_GREATEST, _GREATEST)
                residual.push = push
            return residual.values

    def end(self, push: int, gradients: Mapping[int, Tensor], *, used: bool) -> None:
        """A push is over; unless it was used, residuals are what they were, to rounding.

        Args:
            push: its number.
            gradients: by parameter, as they were pushed.
            used: whether the step was taken with them.
        """
        self._open = _NO_PUSH
        if used:
            return
        for piece, residual in list(self._residuals.items()):
            with residual.lock:
                if residual.push == push and residual.values is not None:
                    gradient = part_of(gradients[piece.parameter], piece)
                    residual.values.view(gradient.shape).sub_(gradient)
                    residual.push = _NO_PUSH

    def forget(self) -> None:
        """Keeps nothing of what was."""
        self._residuals, self._loaded = {}, {}

    def load(self, residuals: Mapping[int, Tensor]) -> None:
        """Begins with these, by parameter and in its shape; they are kept, and not written to."""
        self.forget()
        self._loaded = residuals

    def saved(self, parameters: Sequence[Tensor]) -> dict[int, Tensor]:
        """The residuals of whole parameters: new float32 tensors on the CPU, where there are any.

        Args:
            parameters: the job's, whose shapes they have.
        """
        found = {
            index: one.to("cpu", torch.float32, copy=True) for index, one in self._loaded.items()
        }
        for piece, residual in self._residuals.items():
            if residual.values is not None:
                _settle(residual)
                if piece.parameter not in found:
                    shape = parameters[piece.parameter].shape
                    found[piece.parameter] = torch.zeros(shape, device="cpu")
                part = part_of(found[piece.parameter], piece)
                part.copy_(residual.values.view(part.shape))
        return found

    def _first(self, piece: Slice, device: torch.device) -> Tensor:
        loaded = self._loaded.get(piece.parameter)
        if loaded is None:
            return torch.zeros(piece.element_count, dtype=torch.float32, device=device)
        return part_of(loaded, piece).to(device, torch.float32, copy=True).reshape(-1)


def _settle(residual: _Residual) -> None:
    """Takes away what the newest push has sent."""
    if residual.push != _NO_PUSH and residual.values is not None:
        subtract_quantized(residual.values)
        residual.push = _NO_PUSH
