"""Gradients and weights between GPUs and the frames that they travel in.

Where parameters are on the CPU nothing here is used. On a GPU, `Departures` bring the next slices
of a gradient to the host while frames of the one before go out, and `Landings` queue weights into
their parameters. Both copy over a lane, through pinned memory, and neither waits for a device as a
whole: a thread waits for the one copy that it needs, and what a training loop queues after `step`
waits, on the GPU, for the weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adashard.wire.lanes import Lane, Mark

AHEAD_BYTES_MAX = 8 << 20
"""Of gradients that are copied ahead of one stream's frames, beside the slice at hand."""

LANDING_BYTES_MAX = 16 << 20
"""Of weights that wait in pinned memory for their copies into one GPU."""

LaneOf = Callable[[torch.device], Lane]


@dataclass(frozen=True, slots=True, eq=False)
class _Copy:
    """A copy under way: what is copied stays as long as it is."""

    slice: int
    source: Tensor
    target: Tensor
    mark: Mark


class Departures:
    """Slices of gradients on their way from GPUs to one stream's frames. For one thread.

    A few are under way: as many as fit into `AHEAD_BYTES_MAX`, and the next one in any case.

    Args:
        parts: slices and what is to be sent of each, on a GPU, in the order in which `part` asks
            for them. Taken from a few slices ahead; each must be complete on the current stream.
        lane: makes the lane to a GPU.
    """

    def __init__(self, parts: Iterable[tuple[int, Tensor]], lane: LaneOf = Lane) -> None:
        self._parts = iter(parts)
        self._lane_of = lane
        self._lanes: dict[torch.device, Lane] = {}
        self._copies: deque[_Copy] = deque()
        self._bytes = 0

    def part(self, index: int) -> Tensor | None:
        """A slice's part on the CPU, contiguous and in its shape, when it has come.

        Those before it in the order are given up. None for one that is not in the order.
        """
        self._go_on()
        while self._copies:
            copy = self._copies.popleft()
            self._bytes -= copy.target.nbytes
            self._go_on()
            if copy.slice == index:
                copy.mark.synchronize()
                return copy.target
        return None

    def _go_on(self) -> None:
        """Begins the next copies."""
        while not self._copies or self._bytes < AHEAD_BYTES_MAX:
            following = next(self._parts, None)
            if following is None:
                return
            copy = self._begin(*following)
            self._bytes += copy.target.nbytes
            self._copies.append(copy)

    def _begin(self, index: int, part: Tensor) -> _Copy:
        lane = self._lanes.get(part.device)
        if lane is None:
            lane = self._lanes[part.device] = self._lane_of(part.device)
        source = part.contiguous()
        target = lane.host(source.nbytes).view(source.dtype).view(source.shape)
        lane.follow()
        lane.copy(source, target)
        return _Copy(index, source, target, lane.mark())


class Landings:
    """Weights on their way into parameters on GPUs, over a lane to each.

    `step` belongs to the training loop's thread; `write` and `settle` to any, one at a time.

    Args:
        parameters: where weights go; those on the CPU are of no matter.
        lane: makes the lane to a GPU.
    """

    def __init__(self, parameters: Sequence[Tensor], lane: LaneOf = Lane) -> None:
        devices = {one.device for one in parameters if one.device.type == "cuda"}
        self._lanes = {device: lane(device) for device in devices}
        self._waiting: deque[tuple[Mark, int]] = deque()
        self._bytes = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """While weights may come.

        They are written when the GPU has done what this thread's current stream has been given
        before; what it is given after waits for them.
        """
        for lane in self._lanes.values():
            lane.follow()
        try:
            yield
        finally:
            self.settle()

    def takes(self, target: Tensor) -> bool:
        """Whether what is written to this parameter, or a part of it, goes over a lane."""
        return target.device in self._lanes

    def write(self, target: Tensor, part: Tensor, through: torch.dtype | None) -> None:
        """Queues weights into a part of a parameter.

        Args:
            target: that part; written later.
            part: as many elements, on the CPU, flat; not needed any more on return.
            through: a format that they are rounded to before they get that of the target.
        """
        lane = self._lanes[target.device]
        pinned = lane.host(part.nbytes).view(part.dtype)
        pinned.copy_(part)
        lane.copy(pinned.view(target.shape), target, through=through)
        self._waiting.append((lane.mark(), part.nbytes))
        self._bytes += part.nbytes
        while self._bytes > LANDING_BYTES_MAX:
            mark, byte_count = self._waiting.popleft()
            mark.synchronize()
            self._bytes -= byte_count

    def settle(self) -> None:
        """Lets the current streams, and whoever reads on them, wait for what was written."""
        for lane in self._lanes.values():
            lane.lead()
