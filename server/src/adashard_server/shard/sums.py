"""Whose gradients of one step are in the sum of each slice, and how far they have come. Pure."""

from __future__ import annotations

from collections.abc import Container, Sequence

from adashard.wire.messages import Begin, Progress
from adashard.wire.placement import Slice
from adashard_server.shard.records import bit


class Sums:
    """The sums of the step that is collected, or that slices still owe. Not thread-safe.

    A sum is a list of gradients in rank order, each of them in from its first element on. A worker
    without a gradient for a parameter is in at once.

    Attributes:
        slices: of the job.
        begins: the first frame of each worker's push for this step.
    """

    def __init__(self, slices: tuple[Slice, ...] = ()) -> None:
        self.slices = slices
        self.begins: dict[str, Begin] = {}
        self._came: dict[int, dict[str, int]] = {}  # elements, by slice and worker

    def clear(self) -> None:
        """Begins with nothing in the sums."""
        self.begins = {}
        self._came.clear()

    def added(self, sender: str, index: int, stop: int) -> None:
        """Elements up to `stop` of the worker's gradient are in the slice's sum."""
        self._came.setdefault(index, {})[sender] = stop

    def drop(self, index: int) -> None:
        """Forgets the sum of a slice. Idempotent."""
        self._came.pop(index, None)

    def keep(self, workers: Container[str]) -> None:
        """Forgets pushes of workers that are not among `workers`; sums are looked at apart."""
        self.begins = {name: begin for name, begin in self.begins.items() if name in workers}

    def keep_prefix(self, index: int, order: Sequence[str]) -> None:
        """Keeps what a sum holds if it is how a sum over `order` begins (S4); else forgets it."""
        total = self._came.get(index, {})
        summed = [worker for worker in total if total[worker]]
        expected = [worker for worker in order if not self.absent(worker, index)]
        if summed != expected[: len(summed)]:
            self.drop(index)

    def absent(self, worker: str, index: int) -> bool:
        """Whether the worker has said that it has no gradient for the slice's parameter."""
        begin = self.begins.get(worker)
        return begin is not None and not bit(begin.present, self.slices[index].parameter)

    def nobody(self, index: int, order: Sequence[str]) -> bool:
        """Whether all workers of a sum, if there are any, have said that they add nothing."""
        return all(self.absent(worker, index) for worker in order)

    def sparse(self, begin: Begin, index: int) -> bool:
        """Whether a worker's gradient of the slice's parameter comes in rows."""
        return bit(begin.sparse, self.slices[index].parameter)

    def progress(self, worker: str, index: int) -> int:
        """How many elements of the worker's gradient are in; an absent one is in at once."""
        if worker not in self.begins:
            return 0
        if self.absent(worker, index):
            return self.slices[index].element_count
        return self._came.get(index, {}).get(worker, 0)

    def progress_of(self, worker: str) -> tuple[Progress, ...]:
        """Where the worker is to go on, of the slices for which something of it is in (S5)."""
        came = ((index, total.get(worker, 0)) for index, total in sorted(self._came.items()))
        return tuple(Progress(slice=index, count=count) for index, count in came if count)

    def done(self, worker: str, index: int) -> bool:
        """Whether the whole of the worker's gradient is in."""
        return self.progress(worker, index) == self.slices[index].element_count

    def full(self, index: int, order: Sequence[str]) -> bool:
        """Whether the sum over `order` is whole; one over nobody never is."""
        return bool(order) and all(self.done(worker, index) for worker in order)
