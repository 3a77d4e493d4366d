"""Models that placement is judged by: the shapes of GPT-2 small and of T5, and their jobs."""

from __future__ import annotations

from collections.abc import Iterable

from adashard.wire.placement import DEFAULT_SLICE_BYTES
from adashard.wire.spec import AdafactorLayout, Group, JobSpec, Parameter

Shape = tuple[int, ...]


def _gpt2(*, width: int, vocabulary: int, context: int, layers: int) -> list[Shape]:
    """GPT-2 as published, whose matrices are in x out; the head shares the embedding of tokens."""
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    block = norm + attention + norm + feed_forward
    return [(vocabulary, width), (context, width), *block * layers, *norm]


def _t5(*, width: int, hidden: int, heads: int, head_width: int, layers: int) -> list[Shape]:
    """T5 version 1.0 in the layout of torch, out x in; the head shares the embedding."""
    inner, norm = heads * head_width, (width,)
    attention = [norm, (inner, width), (inner, width), (inner, width), (width, inner)]
    feed_forward = [norm, (hidden, width), (width, hidden)]
    relative_bias = (32, heads)
    encoder = [relative_bias, *(attention + feed_forward) * layers, norm]
    decoder = [relative_bias, *(2 * attention + feed_forward) * layers, norm]
    return [(32128, width), *encoder, *decoder]


GPT2_SMALL = _gpt2(width=768, vocabulary=50257, context=1024, layers=12)
T5_SMALL = _t5(width=512, hidden=2048, heads=8, head_width=64, layers=6)
T5_11B = _t5(width=1024, hidden=65536, heads=128, head_width=128, layers=24)


def job_of(shapes: Iterable[Shape], *, slice_bytes: int = DEFAULT_SLICE_BYTES) -> JobSpec:
    """A job of tensors of these shapes, named by their numbers."""
    return JobSpec(
        parameters=tuple(
            Parameter(name=str(number), shape=shape) for number, shape in enumerate(shapes)
        ),
        groups=(Group(adafactor=AdafactorLayout()),),
        slice_bytes=slice_bytes,
        min_workers=1,
    )
