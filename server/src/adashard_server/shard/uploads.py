"""An upload of whole slices: weights, and optimizer state with them where there is any.

Every run says what the checksum of its tensor is up to there. The last run of weights has the one
that they came with to the worker that sends them, so that weights that its user has changed since
are noticed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from adashard.wire.checksums import RunningChecksums
from adashard.wire.errors import DamagedFrame, InvalidFrame
from adashard.wire.messages import Content, Run, UploadBegin
from adashard.wire.tensors import from_buffer

Shapes = Callable[[int], Mapping[Content, tuple[int, ...]]]


class Upload:
    """What has come of one upload. Slices change as a whole: what breaks off tears nothing.

    Not thread-safe: the engine's lock covers it.

    Args:
        begin: how it began.
        shapes: of what a slice consists of.
        device: where it is gathered.
    """

    def __init__(self, begin: UploadBegin, shapes: Shapes, device: torch.device) -> None:
        self.begin = begin
        self._shapes, self._device = shapes, device
        self._came: dict[tuple[int, Content], int] = {}
        self._torn: dict[int, dict[Content, Tensor]] = {}
        self._checksums = RunningChecksums()

    @property
    def slice_count(self) -> int:
        """Slices of which something has come."""
        return len({index for index, _ in self._came})

    def take(self, run: Run, buffer: memoryview) -> Mapping[Content, Tensor] | None:
        """Takes elements, in order; all of the slice's tensors, flat, once the last has come.

        Raises:
            InvalidFrame: the slice does not consist of these, or the elements do not go on where
                the ones before ended.
            DamagedFrame: they are not those that were sent.
        """
        counts = self._counts(run.slice)
        if run.content not in counts:
            raise InvalidFrame(f"slice {run.slice} has no {run.content.name.lower()} here")
        came, count = self._came.get((run.slice, run.content), 0), counts[run.content]
        if run.start != came or run.count < 1 or came + run.count > count:
            raise InvalidFrame(
                f"slice {run.slice} goes on at element {came} of {count}, not with {run.count} "
                f"from {run.start}"
            )
        checksum = self._checksums.after(run, buffer)
        if checksum != run.checksum:
            raise DamagedFrame(
                f"elements up to {run.start + run.count} of slice {run.slice} came damaged from "
                f"{self.begin.sender}: their checksum is {checksum:08x}, not {run.checksum:08x}",
                slice=run.slice,
            )
        self._came[run.slice, run.content] = came + run.count
        tensors = self._torn.setdefault(run.slice, {})
        if run.content not in tensors:
            tensors[run.content] = torch.empty(count, dtype=torch.float32, device=self._device)
        tensors[run.content][came : came + run.count].copy_(from_buffer(buffer, run.dtype))
        if any(self._came.get((run.slice, content)) != size for content, size in counts.items()):
            return None
        return self._torn.pop(run.slice)

    def _counts(self, index: int) -> dict[Content, int]:
        """Elements of what this upload brings of a slice."""
        shapes = self._shapes(index)
        wanted = shapes if self.begin.state else (Content.WEIGHT,)
        return {content: prod(shapes[content]) for content in wanted}
