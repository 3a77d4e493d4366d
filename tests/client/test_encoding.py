"""Gradients on their way out in fewer bits: any cut, any frame, any attempt, the same elements."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.client.cuts import FORMATS, Cut, cut_routing, models, part_of
from torch import Tensor

from adashard.encoding import Encoding
from adashard.feedback import Feedback
from adashard.quantize import narrowed, quantized
from adashard.routing import Routing
from adashard.rows import coalesced_rows
from adashard.wire import frames as frames_module
from adashard.wire.blocks import BLOCK_ELEMENTS, bytes_of
from adashard.wire.frames import read_frame
from adashard.wire.spec import DType
from adashard.wire.tensors import addend_from, element_count, torch_dtype
from adashard_server.optim.blocks import decoded
from adashard_server.optim.compiled import CompiledPasses

NARROW = (DType.BFLOAT16, DType.FLOAT16, DType.INT8)


def encoding(dtype: DType | None) -> Encoding:
    return Encoding(dtype, feedback=Feedback() if dtype is DType.INT8 else None)


def summed(frames, routing: Routing, total: dict[int, Tensor] | None = None) -> dict[int, Tensor]:
    """What a shard adds of frames, run by run, into sums that begin as zero."""
    sums = {one.index: torch.zeros(one.element_count) for one in routing.slices}
    sums = total if total is not None else sums
    for data in frames:
        for run, buffer in read_frame(data).pieces():
            addend = addend_from(buffer, run.dtype)
            assert element_count(addend) == run.count
            if run.count:
                part = sums[run.slice][run.start : run.start + run.count]
                CompiledPasses.accumulate(part, addend, 1.0, first=False)
    return sums


def expected(part: Tensor, dtype: DType) -> Tensor:
    """A slice's elements as they arrive in a format."""
    if dtype is DType.INT8:
        return decoded(quantized(part.float()), part.numel())
    return narrowed(part, torch_dtype(dtype)).float()


@pytest.mark.parametrize("dtype", NARROW)
@given(drawn=models())
def test_a_shard_adds_what_the_format_makes_of_the_gradient(dtype, drawn):
    cuts, gradients = drawn
    routing = cut_routing(cuts, [torch.zeros(cut.shape) for cut in cuts])
    encoded = encoding(dtype)
    frames = routing.gradient_frames(
        dict(enumerate(gradients)), range(len(routing.slices)), encoding=encoded
    )
    sums = summed(frames, routing)
    for piece in routing.slices:
        whole = gradients[piece.parameter]
        part, travels = part_of(whole, piece), encoded.dtype_of(whole)
        assert torch.equal(sums[piece.index], expected(part, travels))


@given(
    st.lists(st.integers(1, 5 * BLOCK_ELEMENTS), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 6),
    st.data(),
)
def test_int8_adds_up_alike_in_any_frames_whole_or_from_any_block_on(counts, width, blocks, data):
    """Frames of few blocks, so that many of them end at borders of all kinds."""
    cuts = [Cut((count, width)) if count % 2 else Cut((width, count)) for count in counts]
    gradients = {index: torch.randn(cut.shape) for index, cut in enumerate(cuts)}
    routing = cut_routing(cuts, [torch.zeros(cut.shape) for cut in cuts])
    encoded, indices = encoding(DType.INT8), range(len(cuts))
    whole = list(routing.gradient_frames(gradients, indices, encoding=encoded))
    sums = summed(whole, routing)
    starts = {
        piece.index: BLOCK_ELEMENTS
        * data.draw(st.integers(0, piece.element_count // BLOCK_ELEMENTS))
        for piece in routing.slices
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames_module, "PAYLOAD_BYTES_MAX", bytes_of(blocks * BLOCK_ELEMENTS))
        rest = list(routing.gradient_frames(gradients, indices, starts, encoding=encoded))
    again = {index: total.clone() for index, total in sums.items()}
    for index, start in starts.items():
        again[index][start:] = 0.0
    assert all(
        torch.equal(total, sums[index]) for index, total in summed(rest, routing, again).items()
    )
    for piece in routing.slices:
        part = part_of(gradients[piece.parameter], piece)
        assert torch.equal(sums[piece.index], expected(part, DType.INT8))


def test_a_push_that_is_repeated_is_the_same_frames_whatever_came_before():
    cut = Cut((300, 50), 1, frozenset({13}))
    routing, feedback = cut_routing([cut], [torch.zeros(cut.shape)]), Feedback()
    for step in range(3):
        gradients = {0: torch.randn(cut.shape)}
        one = Encoding(DType.INT8, feedback=feedback)
        first = list(routing.gradient_frames(gradients, [0, 1], encoding=one))
        broken = routing.gradient_frames(gradients, [1, 0], encoding=one)
        next(broken)
        assert list(routing.gradient_frames(gradients, [0, 1], encoding=one)) == first
        one.end(gradients, used=step != 1)


@pytest.mark.parametrize("start", [1, 1000, 1025, -1024, 99_999])
def test_where_a_shard_says_nonsense_of_int8_all_is_sent(start):
    routing = cut_routing([Cut((5000,))], [torch.zeros(5000)])
    gradients, encoded = {0: torch.randn(5000)}, encoding(DType.INT8)
    (whole,) = routing.gradient_frames(gradients, [0], encoding=encoded)
    (again,) = routing.gradient_frames(gradients, [0], {0: start}, encoding=encoded)
    assert again == whole


@pytest.mark.parametrize(("asked", "own"), [*itertools.product((*NARROW, DType.FLOAT32), FORMATS)])
def test_no_gradient_is_made_wider(asked, own):
    gradient = torch.ones(3, dtype=own)
    dtype = encoding(asked).dtype_of(gradient)
    item = 1 if dtype is DType.INT8 else torch_dtype(dtype).itemsize
    assert item <= own.itemsize
    assert dtype is asked or torch_dtype(dtype) is own


@pytest.mark.parametrize("asked", [None, *NARROW])
def test_rows_travel_as_asked_but_for_int8_as_bfloat16(asked):
    rows = torch.sparse_coo_tensor([[4, 1]], torch.randn(2, 7), (6, 7), check_invariants=False)
    gradient = coalesced_rows("p0", rows)
    routing = cut_routing([Cut((6, 7), 1, frozenset({3}))], [torch.zeros(6, 7)])
    encoded = encoding(asked)
    frames = list(routing.gradient_frames({0: gradient}, [0, 1], encoding=encoded))
    dtypes = {run.dtype for frame in frames for run in read_frame(frame).runs}
    wanted = {None: DType.FLOAT32, DType.INT8: DType.BFLOAT16}.get(asked, asked)
    assert dtypes == {wanted}
    sums = summed(frames, routing)
    for piece in routing.slices:
        assert torch.equal(sums[piece.index], expected(part_of(gradient.to_dense(), piece), wanted))


def test_the_gradient_itself_is_left_as_it_was():
    gradient = torch.randn(3000)
    before = gradient.clone()
    routing = cut_routing([Cut((3000,))], [torch.zeros(3000)])
    for dtype in NARROW:
        list(routing.gradient_frames({0: gradient}, [0], encoding=encoding(dtype)))
    assert torch.equal(gradient, before)
