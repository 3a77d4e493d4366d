"""Cuts a model's tensors along the placement, and puts what comes back into them.

Views, no copies: a gradient goes out from where autograd left it, and weights are written in
place as frames arrive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from adashard.wire.errors import InvalidFrame
from adashard.wire.frames import Extent, cut_runs, data_frame
from adashard.wire.messages import Entry, Member, Run
from adashard.wire.placement import Slice, cut
from adashard.wire.spec import DType, JobSpec
from adashard.wire.tensors import as_buffer, flat_on_cpu, from_buffer, wire_dtype


class Routing:
    """The parameters of one model, by slice. Not thread-safe; the session's lock covers writes.

    Args:
        spec: the job.
        parameters: its tensors, in the order of `spec.parameters`; written in place.
    """

    def __init__(self, spec: JobSpec, parameters: Sequence[Tensor]) -> None:
        self.slices: tuple[Slice, ...] = cut(spec)
        self._parameters = tuple(parameters)
        self._staged: dict[int, Tensor] = {}

    def dtypes(self) -> tuple[DType, ...]:
        """The formats in which weights are wanted: one for all parameters, or one each."""
        each = tuple(wire_dtype(parameter.dtype) for parameter in self._parameters)
        return each[:1] if len(set(each)) <= 1 else each

    def by_shard(self, entry: Entry) -> dict[Member, list[int]]:
        """The slices of each shard that has any, ascending."""
        found: dict[Member, list[int]] = {}
        for index, owner in enumerate(entry.placement):
            found.setdefault(entry.shards[owner], []).append(index)
        return found

    def gradient_frames(
        self, gradients: Mapping[int, Tensor], indices: Iterable[int]
    ) -> Iterator[bytes]:
        """The frames that carry the gradients of `indices`, where there are any.

        Args:
            gradients: by parameter; any of the formats that travel, on any device.
            indices: slices, in the order in which they are sent.
        """
        return self._frames(gradients, [i for i in indices if self._owner(i) in gradients])

    def weight_frames(self, indices: Iterable[int]) -> Iterator[bytes]:
        """The frames that carry the weights of `indices` as they stand."""
        return self._frames(dict(enumerate(self._parameters)), list(indices))

    def write(self, run: Run, buffer: memoryview) -> bool:
        """Writes elements that have arrived into their parameter, in place.

        Returns:
            Whether they were there before, bit for bit.

        Raises:
            InvalidFrame: the run does not fit its slice, or is not in the parameter's format.
        """
        parameter = self._parameters[self._owner(run.slice)]
        if run.start + run.count > self.slices[run.slice].element_count:
            raise InvalidFrame(f"a reply reaches beyond slice {run.slice}: {run}")
        if wire_dtype(parameter.dtype) != run.dtype:
            raise InvalidFrame(f"a reply for {parameter.dtype} came as {run.dtype.name}")
        target = self._target(run.slice, parameter)[run.start : run.start + run.count]
        fresh = from_buffer(buffer, run.dtype).to(target.device)
        same = torch.equal(target.view(torch.uint8), fresh.view(torch.uint8))
        target.copy_(fresh)
        self._unstage(run, parameter)
        return same

    def _frames(self, tensors: Mapping[int, Tensor], indices: Sequence[int]) -> Iterator[bytes]:
        """Frames of whole slices; each tensor is flattened once, when its first frame is due."""
        flat: dict[int, Tensor] = {}

        def extents() -> Iterator[Extent]:
            for index in indices:
                piece = self.slices[index]
                dtype = wire_dtype(tensors[piece.parameter].dtype)
                row = piece.shape[-1] if piece.shape else 1
                yield Extent(index, piece.element_count, row, dtype)

        for runs in cut_runs(extents()):
            parts = []
            for run in runs:
                if run.slice not in flat:
                    flat = {run.slice: flat_on_cpu(tensors[self._owner(run.slice)])}
                parts.append(as_buffer(flat[run.slice][run.start : run.start + run.count]))
            yield data_frame(runs, parts)

    def _target(self, index: int, parameter: Tensor) -> Tensor:
        """Where the elements of a slice are written: the parameter itself, or a staging copy.

        A parameter that is not laid out row by row takes its elements when the slice is whole.
        """
        data = parameter.detach()
        if data.is_contiguous():
            return data.view(-1)
        if index not in self._staged:
            self._staged[index] = data.reshape(-1).contiguous()
        return self._staged[index]

    def _unstage(self, run: Run, parameter: Tensor) -> None:
        if run.start + run.count == self.slices[run.slice].element_count:
            staged = self._staged.pop(run.slice, None)
            if staged is not None:
                parameter.detach().copy_(staged.view(parameter.shape))

    def _owner(self, index: int) -> int:
        if not 0 <= index < len(self.slices):
            raise InvalidFrame(f"there is no slice {index}; the job has {len(self.slices)}")
        return self.slices[index].parameter
