"""Elements of gradients that have come before it is their turn, within a bound.

Sums over workers go in rank order, so what a worker sends before those of lower rank have come as
far has to wait: here first, so that its stream can go on, and by flow control once this is full.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from adashard.wire.messages import Begin, Run
from adashard.wire.tensors import addend_from

EARLY_BYTES_MAX = 32 << 20


@dataclass(frozen=True, slots=True)
class EarlyRun:
    """A run that waits, with its own copy of the elements, in the format that they came in."""

    begin: Begin
    run: Run
    addend: Tensor


class EarlyRuns:
    """The runs of one job that wait on one shard. Not thread-safe: the engine's lock covers it.

    Args:
        bytes_max: of all of them together.
    """

    def __init__(self, bytes_max: int = EARLY_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._waiting: dict[int, dict[str, deque[EarlyRun]]] = {}

    @property
    def slices(self) -> list[int]:
        """Slices that runs wait for."""
        return list(self._waiting)

    def ahead(self, sender: str, index: int) -> int:
        """Up to which element a worker's runs of a slice wait; 0 for none."""
        waiting = self._waiting.get(index, {}).get(sender)
        return waiting[-1].run.start + waiting[-1].run.count if waiting else 0

    def put(self, begin: Begin, run: Run, buffer: memoryview) -> bool:
        """Takes a run to wait, copied; False if there is no room for it."""
        if self._bytes + buffer.nbytes > self._bytes_max:
            return False
        addend = addend_from(buffer, run.dtype).clone()
        early = EarlyRun(begin, run, addend)
        self._waiting.setdefault(run.slice, {}).setdefault(begin.sender, deque()).append(early)
        self._bytes += buffer.nbytes
        return True

    def first(self, index: int) -> list[EarlyRun]:
        """The first run of each worker that waits for a slice."""
        return [waiting[0] for waiting in self._waiting.get(index, {}).values()]

    def added(self, sender: str, index: int, stop: int) -> None:
        """A worker's elements up to `stop` are in the sum: runs of them wait no longer."""
        waiting = self._waiting.get(index, {}).get(sender)
        while waiting and waiting[0].run.start + waiting[0].run.count <= stop:
            self._pop(index, sender)

    def drop(self, sender: str) -> None:
        """Forgets the runs of a worker, whose new stream brings them again."""
        for index in self.slices:
            for _ in range(len(self._waiting[index].get(sender, ()))):
                self._pop(index, sender)

    def clear(self) -> None:
        """Forgets all runs."""
        self._waiting.clear()
        self._bytes = 0

    def _pop(self, index: int, sender: str) -> None:
        waiting = self._waiting[index][sender]
        self._bytes -= waiting.popleft().addend.nbytes
        if not waiting:
            del self._waiting[index][sender]
        if not self._waiting[index]:
            del self._waiting[index]
