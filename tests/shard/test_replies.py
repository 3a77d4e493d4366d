"""What a reply consists of: weights in the format that is asked for, and state if it is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.tables import alive, read
from tests.shard.trainings import Training

from adashard.wire.frames import ITEM_BYTES, read_frame
from adashard.wire.messages import Content, Run
from adashard.wire.placement import cut
from adashard.wire.spec import DType, Rounding
from adashard.wire.tensors import from_buffer, torch_dtype
from adashard_server.optim.rounding import rounded
from adashard_server.shard import replies
from adashard_server.shard.replies import elements, extents
from adashard_server.shard.slices import SliceStore

# Columns that are cut, a scalar, a batch of matrices, a vector; with momentum.
JOB = jobs.spec((2, 40), (), (3, 2, 4), (5,), slice_bytes=100, momentum=True)
NARROW = [DType.BFLOAT16, DType.FLOAT16]


def filled() -> SliceStore:
    """A store with other numbers in every tensor."""
    store = SliceStore(JOB, cut(JOB), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for piece in cut(JOB):
        store.put(
            piece.index,
            {
                content: torch.randn(torch.Size(shape).numel(), generator=generator)
                for content, shape in store.shapes(piece.index).items()
            },
        )
    return store


def asked(**options):
    return jobs.begin(jobs.entry(JOB), "a", 7, push=False, **options)


@pytest.mark.parametrize("piece", cut(JOB), ids=lambda piece: str(piece.shape))
def test_state_comes_after_the_weights_in_float32_and_only_where_it_is_asked_for(piece):
    store = filled()
    kinds = [Content.ROW, Content.COLUMN] if piece.axes else [Content.VECTOR]
    with_state = list(extents(store, piece, asked(state=True, dtypes=(DType.BFLOAT16,))))
    assert [one.content for one in with_state] == [Content.WEIGHT, *kinds, Content.MOMENTUM]
    assert [one.dtype for one in with_state] == [DType.BFLOAT16] + [DType.FLOAT32] * (
        len(kinds) + 1
    )
    for one in with_state:
        assert one.count == store.tensor(piece.index, one.content).numel()
    without = list(extents(store, piece, asked(dtypes=(DType.BFLOAT16,))))
    assert without == with_state[:1]


def test_each_parameter_has_its_own_format():
    store, dtypes = filled(), (DType.FLOAT64, DType.BFLOAT16, DType.FLOAT32, DType.FLOAT16)
    for piece in cut(JOB):
        (extent,) = extents(store, piece, asked(dtypes=dtypes))
        assert extent.dtype is dtypes[piece.parameter]


@given(st.sampled_from(sorted(ITEM_BYTES)), st.integers(0, 19), st.integers(1, 20))
def test_weights_are_rounded_to_nearest_once(dtype, start, count):
    store = filled()
    run = Run(slice=0, start=start, count=min(count, 20 - start), dtype=dtype)
    sent = from_buffer(elements(store, run, asked()), dtype)
    masters = store.tensor(0, Content.WEIGHT)[run.start : run.start + run.count]
    assert torch.equal(sent, masters.to(torch_dtype(dtype)))


@given(
    st.sampled_from(NARROW),
    st.integers(-(2**63), 2**63 - 1),
    st.sets(st.integers(1, 19), max_size=4),
)
def test_stochastic_rounding_has_the_same_bits_wherever_frames_end(dtype, seed, borders):
    store = filled()
    begin = asked(rounding=Rounding.STOCHASTIC, seed=seed)
    sent = torch.cat(
        [
            from_buffer(
                elements(store, Run(slice=1, start=a, count=b - a, dtype=dtype), begin), dtype
            )
            for a, b in itertools.pairwise(sorted({0, 20, *borders}))
        ]
    )
    whole = rounded(
        store.tensor(1, Content.WEIGHT),
        torch_dtype(dtype),
        seed=seed,
        slice_index=1,
        step=7,
        first=0,
    )
    assert torch.equal(sent, whole)


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT64])
def test_what_is_as_wide_as_the_masters_is_not_rounded_whatever_is_asked_for(monkeypatch, dtype):
    monkeypatch.delattr(replies, "rounded")
    store, begin = filled(), asked(rounding=Rounding.STOCHASTIC)
    sent = from_buffer(elements(store, Run(slice=0, start=0, count=20, dtype=dtype), begin), dtype)
    assert torch.equal(sent.float(), store.tensor(0, Content.WEIGHT))


def test_state_is_not_rounded():
    store = filled()
    begin = asked(rounding=Rounding.STOCHASTIC, dtypes=(DType.BFLOAT16,), state=True)
    run = Run(slice=0, start=1, count=19, dtype=DType.FLOAT32, content=Content.MOMENTUM)
    sent = from_buffer(elements(store, run, begin), DType.FLOAT32)
    assert torch.equal(sent, store.tensor(0, Content.MOMENTUM)[1:])


def test_a_reply_with_state_is_read_from_its_frames_whole():
    """Through an engine, with what several slices and kinds share a frame."""
    weights = {i: torch.randn(p.shape) for i, p in enumerate(JOB.parameters)}
    training = Training(JOB, weights, placement=[0] * len(cut(JOB)), workers=1)
    engine = training.table.engine()
    begin = jobs.begin(training.table.entry, "a", 0, push=False, state=True)
    acknowledge = engine.begin(begin)
    frames = list(engine.reply(begin, alive))
    (frame,) = frames
    assert [run.content for run in read_frame(frame).runs][:4] == [
        Content.WEIGHT,
        Content.ROW,
        Content.COLUMN,
        Content.MOMENTUM,
    ]
    reply = read(acknowledge, None, iter(frames))
    for piece in cut(JOB):
        assert reply.weights[piece.index].numel() == piece.element_count
        assert not any(one.any() for one in reply.states[piece.index].values())
