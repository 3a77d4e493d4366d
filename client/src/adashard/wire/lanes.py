"""Lanes: copies between a GPU and pinned host memory, on a stream of their own.

On the stream that computes, a copy would wait for all that was queued before it, and what comes
after would wait for the copy. From memory that is not pinned, the thread would wait for it as well.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place in what is queued on a stream."""

    def synchronize(self) -> object:
        """Has this thread wait until the stream has come here; the GIL is dropped."""


class Lane:
    """Copies to and from one GPU. Thread-safe, but `copy` keeps the order of one thread only.

    "The current stream" is that of the calling thread, on this GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def host(self, byte_count: int) -> Tensor:
        """Pinned memory, flat uint8. torch hands it out again once all copies are through."""
        return torch.empty(byte_count, dtype=torch.uint8, pin_memory=True)

    def room(self, byte_count: int) -> Tensor:
        """Memory of the GPU, flat uint8, for copies of this lane."""
        with torch.cuda.stream(self._stream):
            return torch.empty(byte_count, dtype=torch.uint8, device=self.device)

    def copy(self, source: Tensor, target: Tensor, *, through: torch.dtype | None = None) -> None:
        """Queues a copy, which may be under way for as long as its mark is not reached.

        Args:
            source: here or there, of the target's shape; must stay as it is until then.
            target: here or there, in any format; on the host pinned, and of the source's format.
            through: a format that elements are rounded to on their way.
        """
        with torch.cuda.stream(self._stream):
            if target.device == self.device:  # formats are changed there, not by the CPU
                source = source.to(self.device, non_blocking=True)
            if through is not None:
                source = source.to(through)
            target.copy_(source, non_blocking=True)

    def follow(self) -> None:
        """Lets copies from now on wait for what the current stream has been given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def lead(self) -> None:
        """Lets the current stream wait, from now on, for the copies so far; no thread waits."""
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def mark(self) -> Mark:
        """The end of the copies so far."""
        mark: Mark = self._stream.record_event()
        return mark

    def current(self) -> Mark:
        """The end of what the current stream has been given so far."""
        mark: Mark = torch.cuda.current_stream(self.device).record_event()
        return mark
