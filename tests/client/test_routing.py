"""Tensors cut along a placement and put back: by slices, in any layout and format."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.client.cuts import (
    FORMATS,
    Cut,
    cut_routing,
    models,
    part_of,
    received,
    runs_of,
    tensors_of,
    watch_sources,
)
from tests.shard import jobs
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from adashard import routing as routing_module
from adashard.push import Replies
from adashard.routing import Routing
from adashard.wire.errors import InvalidFrame, UnsupportedParameter
from adashard.wire.frames import PAYLOAD_BYTES_MAX, read_frame
from adashard.wire.messages import Member
from adashard.wire.spec import DType
from adashard.wire.tensors import as_buffer, flat_on_cpu, wire_dtype

SHAPES = ((4, 3), (5,), (), (2, 3, 2))


def tensors(dtypes=(torch.float32,) * 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).to(dtype)
        for shape, dtype in zip(SHAPES, dtypes, strict=True)
    ]


def routing(parameters: list[Tensor]) -> Routing:
    return Routing(jobs.spec(*SHAPES), parameters)


def write(target: Routing, index: int, flat: Tensor, borders: list[int] | None = None) -> bool:
    """A whole slice, in parts that end at `borders`."""
    parts = [as_buffer(part) for _, part in runs_of(index, flat, borders or [])]
    return target.write(index, parts, wire_dtype(flat.dtype))


formats = st.tuples(*[st.sampled_from(FORMATS)] * 4)


@given(models(), st.data())
def test_every_slice_of_a_gradient_is_sent_whole_wherever_it_lies_in_memory(model, data):
    drawn, gradients = model
    cutter = cut_routing(drawn, [torch.zeros(one.shape) for one in drawn])
    wanted = data.draw(st.permutations(range(len(cutter.slices))))
    came = received(cutter.gradient_frames(dict(enumerate(gradients)), wanted))
    assert list(came) == wanted
    for index, flat in came.items():
        piece = cutter.slices[index]
        assert flat.dtype is gradients[piece.parameter].dtype
        assert torch.equal(flat, part_of(gradients[piece.parameter], piece))


@given(models(), st.data())
def test_slices_restore_every_bit_in_any_order_wherever_they_lie_in_memory(model, data):
    drawn, theirs = model
    mine = [
        data.draw(tensors_of(one.shape, other.dtype))
        for one, other in zip(drawn, theirs, strict=True)
    ]
    target = cut_routing(drawn, mine)
    for piece in data.draw(st.permutations(target.slices)):
        flat = part_of(theirs[piece.parameter], piece)
        there = torch.equal(part_of(mine[piece.parameter], piece), flat)
        borders = data.draw(st.lists(st.integers(1, 30), max_size=3))
        assert write(target, piece.index, flat, borders) == there
        assert torch.equal(target.view(piece.index).reshape(-1), flat)
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


@given(st.lists(st.lists(st.integers(1, 9), max_size=4).map(tuple), min_size=1, max_size=4))
def test_models_that_are_cut_small_come_through_whole(shapes):
    spec = replace(jobs.spec(*shapes), slice_bytes=64)
    theirs, mine = [[torch.randn(shape) for shape in shapes] for _ in range(2)]
    source, target = Routing(spec, theirs), Routing(spec, mine)
    for piece in source.slices:
        write(target, piece.index, flat_on_cpu(source.view(piece.index)), [3, 8])
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


# --- where a repeated push goes on ---------------------------------------------------------------


@given(models(), st.data())
def test_what_is_there_already_is_not_sent_again(model, data):
    drawn, gradients = model
    cutter = cut_routing(drawn, gradients)
    counts = {piece.index: piece.element_count for piece in cutter.slices}
    starts = data.draw(
        st.fixed_dictionaries({}, optional={i: st.integers(0, n) for i, n in counts.items()})
    )
    frames = list(cutter.gradient_frames(dict(enumerate(gradients)), counts, starts))
    firsts = {}
    for run in [run for frame in frames for run in read_frame(frame).runs]:
        firsts.setdefault(run.slice, run.start)
    assert firsts == {i: starts.get(i, 0) for i in counts if starts.get(i, 0) < counts[i]}
    for index, flat in received(frames).items():
        piece = cutter.slices[index]
        assert torch.equal(flat, part_of(gradients[piece.parameter], piece)[firsts[index] :])


@pytest.mark.parametrize("start", [-1, 13, 1 << 40])
def test_what_cannot_be_there_is_sent_from_the_start(start):
    gradient = torch.randn(4, 3)
    frames = routing(tensors()).gradient_frames({0: gradient}, [0], {0: start})
    assert torch.equal(received(frames)[0], gradient.reshape(-1))


@pytest.mark.parametrize(("start", "sent"), [(0, 3), (2, 3), (12, 0)])
def test_sparse_rows_are_there_whole_or_sent_from_the_start(start, sent):
    gradient = torch.sparse_coo_tensor(
        [[1]], torch.ones(1, 3), (4, 3), check_invariants=True
    ).coalesce()
    frames = routing(tensors()).gradient_frames({0: gradient}, [0], {0: start})
    assert sum(flat.numel() for flat in received(frames).values()) == sent


# --- what is copied, and what is not -------------------------------------------------------------


@given(formats, st.sets(st.integers(0, 3)), st.permutations(range(4)))
def test_gradients_are_sent_as_they_are_where_there_are_any(dtypes, present, order):
    gradients = tensors(dtypes)
    there = {index: gradients[index] for index in present}
    came = received(routing(tensors()).gradient_frames(there, order))
    assert list(came) == [index for index in order if index in present]
    for index, flat in came.items():
        assert flat.dtype is dtypes[index]
        assert torch.equal(flat, gradients[index].reshape(-1))


@given(formats, st.lists(st.integers(1, 11), max_size=3))
def test_what_one_worker_has_another_writes_bit_for_bit(dtypes, borders):
    theirs, mine = tensors(dtypes, seed=1), tensors(dtypes, seed=2)
    target = routing(mine)
    for index, tensor in enumerate(theirs):
        write(target, index, tensor.reshape(-1), borders)
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_weights_are_written_in_place_and_gradients_are_sent_from_where_they_are(monkeypatch):
    """No copies: every buffer that is read is memory of the tensor itself."""
    parameters, gradients = tensors(), tensors(seed=1)
    addresses = [parameter.data_ptr() for parameter in parameters]
    sources = watch_sources(monkeypatch)
    cutter = routing(parameters)
    list(cutter.gradient_frames(dict(enumerate(gradients)), range(4)))
    assert sources == [gradient.data_ptr() for gradient in gradients]
    for index, gradient in enumerate(gradients):
        write(cutter, index, gradient.reshape(-1))
    assert [parameter.data_ptr() for parameter in parameters] == addresses


def test_rows_are_written_in_place_and_sent_from_where_they_are(monkeypatch):
    sources = watch_sources(monkeypatch)
    parameter, gradient = torch.zeros(6, 4), torch.randn(6, 4)
    cutter = cut_routing([Cut((6, 4), 0, frozenset({1, 4}))], [parameter])
    list(cutter.gradient_frames({0: gradient}, range(3)))
    assert sources == [gradient[row].data_ptr() for row in (0, 1, 4)]
    monkeypatch.setattr(routing_module.torch, "cat", None)  # nothing is put together first
    assert not write(cutter, 1, torch.ones(12), [5])
    assert torch.equal(parameter[1:4], torch.ones(3, 4))


def test_a_slice_that_is_in_pieces_is_copied_once_and_goes_before_the_next(monkeypatch):
    copies: list[StorageWeakRef] = []
    original = routing_module.flat_on_cpu

    def watched(part):
        assert all(copy.expired() for copy in copies)
        flat = original(part)
        assert flat.data_ptr() != part.data_ptr()
        copies.append(StorageWeakRef(flat.untyped_storage()))
        return flat

    monkeypatch.setattr(routing_module, "flat_on_cpu", watched)
    gradient = torch.randn(500, 2400).t()
    cutter = cut_routing([Cut((2400, 500), 0, frozenset({600, 1200, 1800}))], [gradient])
    frames = []
    for frame in cutter.gradient_frames({0: gradient}, range(4)):
        frames.append(frame)
        assert sum(not copy.expired() for copy in copies) <= 1
    assert len(copies) == 4
    assert any(len({run.slice for run in read_frame(frame).runs}) > 1 for frame in frames)
    for index, flat in received(frames).items():
        assert torch.equal(flat, part_of(gradient, cutter.slices[index]))


def test_a_slice_between_columns_is_copied_frame_by_frame_and_written_row_by_row(monkeypatch):
    sizes: list[int] = []
    original = routing_module.row_by_row
    monkeypatch.setattr(
        routing_module, "row_by_row", lambda one: sizes.append(one.nbytes) or original(one)
    )
    gradient, parameter = torch.randn(500, 2400), torch.zeros(500, 2400)
    cutter = cut_routing([Cut((500, 2400), 1, frozenset({1200}))], [parameter])
    frames = list(cutter.gradient_frames({0: gradient}, range(2)))
    assert max(sizes) <= PAYLOAD_BYTES_MAX < gradient.nbytes / 2
    (first, *_), flat = read_frame(frames[0]).runs, gradient[:, :1200].reshape(-1)
    monkeypatch.setattr(routing_module.torch, "cat", None)
    assert not write(cutter, 0, flat, [first.count])
    assert torch.equal(parameter[:, :1200], gradient[:, :1200])
    assert not parameter[:, 1200:].any()


def test_a_slice_that_comes_in_parts_that_end_inside_a_row_is_written_all_the_same():
    parameter = torch.zeros(3, 4)
    target = cut_routing([Cut((3, 4), 1, frozenset({2}))], [parameter])
    assert not write(target, 1, torch.arange(1.0, 7.0), [3])
    assert torch.equal(parameter[:, 2:], torch.arange(1.0, 7.0).view(3, 2))
    assert not parameter[:, :2].any()


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("borders", [[], [1], [5, 7]])
def test_a_parameter_of_another_layout_is_written_through_its_layout(borders):
    base = torch.zeros(3, 4)
    parameter = base.t()
    assert not parameter.is_contiguous()
    target = Routing(jobs.spec((4, 3)), [parameter])
    fresh = torch.arange(1.0, 13.0)
    assert not write(target, 0, fresh, borders)
    assert torch.equal(parameter, fresh.view(4, 3))
    assert torch.equal(base, fresh.view(4, 3).t())
    assert write(target, 0, fresh, borders), "the same bits, said again"


def test_a_strided_view_of_a_larger_tensor_leaves_what_is_between():
    base = torch.zeros(4, 6)
    parameter = base[:, ::2]
    target = Routing(jobs.spec((4, 3)), [parameter])
    write(target, 0, torch.ones(12))
    assert torch.equal(base[:, ::2], torch.ones(4, 3))
    assert torch.equal(base[:, 1::2], torch.zeros(4, 3))


def test_minus_zero_is_another_weight_than_zero():
    parameter = torch.zeros(2)
    target = Routing(jobs.spec((2,)), [parameter])
    assert not write(target, 0, torch.tensor([0.0, -0.0]))
    assert torch.equal(torch.signbit(parameter), torch.tensor([False, True]))


def test_not_a_number_is_there_when_it_was_there_before():
    parameter = torch.full((2,), torch.nan)
    target = Routing(jobs.spec((2,)), [parameter])
    assert write(target, 0, parameter.clone())


def test_it_is_told_whether_weights_were_there_before():
    parameters = tensors()
    target = routing(parameters)
    same = parameters[0].clone().reshape(-1)
    assert write(target, 0, same)
    same[-1] += 1
    assert not write(target, 0, same)
    same[0] += 1
    assert not write(target, 0, same, [3]), "what differs may be in any part"


def test_a_parameter_that_needs_a_gradient_is_written_all_the_same():
    parameter = torch.nn.Parameter(torch.zeros(3))
    write(Routing(jobs.spec((3,)), [parameter]), 0, torch.ones(3))
    assert torch.equal(parameter.detach(), torch.ones(3))
    assert parameter.requires_grad


@pytest.mark.parametrize("index", [-1, 4])
def test_a_slice_that_does_not_exist_is_refused(index):
    with pytest.raises(InvalidFrame, match="there is no slice"):
        write(routing(tensors()), index, torch.ones(1))


def test_formats_are_said_once_where_all_are_the_same():
    assert routing(tensors()).dtypes() == (DType.FLOAT32,)
    assert routing(tensors(FORMATS)).dtypes() == (
        DType.FLOAT32,
        DType.BFLOAT16,
        DType.FLOAT16,
        DType.FLOAT64,
    )


@given(models(), st.sampled_from(FORMATS), st.data())
def test_weights_are_wanted_in_one_format_and_written_in_the_parameters(model, wanted, data):
    drawn, mine = model
    target = cut_routing(drawn, mine, replies=Replies(dtype=wanted))
    assert target.dtypes() == (wire_dtype(wanted),)
    theirs = [torch.randn(one.shape).to(wanted) for one in drawn]
    before = [one.clone() for one in mine]
    for piece in target.slices:
        flat = part_of(theirs[piece.parameter], piece)
        there = torch.equal(
            part_of(before[piece.parameter], piece), flat.to(mine[piece.parameter].dtype)
        )
        borders = data.draw(st.lists(st.integers(1, 9)))
        assert write(target, piece.index, flat, borders) == there
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other.to(one.dtype))


def test_a_format_that_is_narrower_than_the_one_wanted_is_rounded_to_nearest():
    parameter = torch.zeros(3, dtype=torch.bfloat16)
    target = Routing(jobs.spec((3,)), [parameter], replies=Replies(dtype=torch.float32))
    wide = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20])
    assert not write(target, 0, wide)
    assert parameter.tolist() == [1.0, 1 + 2**-6, 1 + 2**-7], "ties go to even"
    assert write(target, 0, wide)


def test_a_format_that_does_not_travel_is_refused():
    whole = Routing(jobs.spec((2,)), [torch.zeros(2, dtype=torch.int64)])
    with pytest.raises(UnsupportedParameter):
        whole.dtypes()


@given(st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_every_slice_goes_to_the_shard_where_it_is_placed(placement):
    entry = jobs.entry(jobs.spec(*SHAPES), shards=("s0", "s1", "s2"), placement=placement)
    by_shard = routing(tensors()).by_shard(entry)
    assert all(indices == sorted(indices) for indices in by_shard.values())
    assert {index: member for member, indices in by_shard.items() for index in indices} == {
        index: Member(id=f"s{owner}") for index, owner in enumerate(placement)
    }
