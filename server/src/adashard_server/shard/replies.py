"""What a reply consists of: the runs of a slice and its state, and their elements."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from adashard.wire.frames import Extent
from adashard.wire.messages import Begin, Content, Run
from adashard.wire.placement import Slice
from adashard.wire.spec import DType, Rounding
from adashard.wire.tensors import as_buffer, torch_dtype
from adashard_server.optim.rounding import rounded
from adashard_server.shard.slices import SliceStore

_NARROW = (DType.BFLOAT16, DType.FLOAT16)


def extents(store: SliceStore, piece: Slice, begin: Begin) -> Iterator[Extent]:
    """What is sent of a slice: its weights in the format asked for; its state if that is asked for.

    State is float32, whatever the weights are.
    """
    dtype = begin.dtypes[piece.parameter if len(begin.dtypes) > 1 else 0]
    for content, shape in store.shapes(piece.index).items():
        if content is Content.WEIGHT or begin.state:
            wanted = dtype if content is Content.WEIGHT else DType.FLOAT32
            row = shape[-1] if shape else 1
            yield Extent(piece.index, prod(shape), row, wanted, content)


def elements(store: SliceStore, run: Run, begin: Begin) -> memoryview:
    """The elements of a run, rounded as the worker wants it."""
    tensor = store.tensor(run.slice, run.content)[run.start : run.start + run.count].cpu()
    dtype = torch_dtype(run.dtype)
    if begin.rounding is Rounding.NEAREST or run.dtype not in _NARROW:
        return as_buffer(tensor.to(dtype))
    key = {"seed": begin.seed, "slice_index": run.slice, "step": begin.step, "first": run.start}
    return as_buffer(rounded(tensor, dtype, **key))


def whole_already(index: int) -> Run:
    """Says of a slice that the worker has it at this version, bit for bit."""
    return Run(slice=index, start=0, count=0, dtype=DType.FLOAT32)
