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
)
from tests.shard import jobs
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from adashard import routing as routing_module
from adashard.routing import Routing
from adashard.wire.errors import InvalidFrame, UnsupportedParameter
from adashard.wire.frames import PAYLOAD_BYTES_MAX, read_frame
from adashard.wire.messages import Content, Member, Run
from adashard.wire.spec import DType
from adashard.wire.tensors import as_buffer, wire_dtype

SHAPES = ((4, 3), (5,), (), (2, 3, 2))


def tensors(dtypes=(torch.float32,) * 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).to(dtype)
        for shape, dtype in zip(SHAPES, dtypes, strict=True)
    ]


def routing(parameters: list[Tensor]) -> Routing:
    return Routing(jobs.spec(*SHAPES), parameters)


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
def test_slices_that_come_between_each_other_restore_every_bit(model, data):
    drawn, theirs = model
    mine = [
        data.draw(tensors_of(one.shape, other.dtype))
        for one, other in zip(drawn, theirs, strict=True)
    ]
    target = cut_routing(drawn, mine)
    left = {
        piece.index: list(
            runs_of(
                piece.index,
                part_of(theirs[piece.parameter], piece),
                data.draw(st.lists(st.integers(1, 30), max_size=3)),
            )
        )
        for piece in target.slices
    }
    while left:
        index = data.draw(st.sampled_from(sorted(left)))
        run, part = left[index].pop(0)
        old = part_of(mine[target.slices[index].parameter], target.slices[index])
        there = torch.equal(old[run.start : run.start + run.count], part)
        assert target.write(run, as_buffer(part)) == there
        if not left[index]:
            del left[index]
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


@given(st.lists(st.lists(st.integers(1, 9), max_size=4).map(tuple), min_size=1, max_size=4))
def test_models_that_are_cut_small_come_through_whole(shapes):
    spec = replace(jobs.spec(*shapes), slice_bytes=64)
    theirs, mine = [[torch.randn(shape) for shape in shapes] for _ in range(2)]
    target = Routing(spec, mine)
    sent = Routing(spec, theirs).weight_frames(range(len(target.slices)))
    for index, flat in received(sent).items():
        for run, part in runs_of(index, flat, [3, 8]):
            target.write(run, as_buffer(part))
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


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
def test_what_one_worker_sends_another_writes_bit_for_bit(dtypes, borders):
    theirs, mine = tensors(dtypes, seed=1), tensors(dtypes, seed=2)
    target = routing(mine)
    for index, flat in received(routing(theirs).weight_frames(range(4))).items():
        for run, part in runs_of(index, flat, borders):
            target.write(run, as_buffer(part))
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_weights_are_written_in_place_and_gradients_are_sent_from_where_they_are(monkeypatch):
    """No copies: every buffer that is read is memory of the tensor itself."""
    parameters, gradients = tensors(), tensors(seed=1)
    addresses = [parameter.data_ptr() for parameter in parameters]
    sources: list[int] = []
    original = routing_module.as_buffer

    def watched(flat):
        sources.append(flat.data_ptr())
        return original(flat)

    monkeypatch.setattr(routing_module, "as_buffer", watched)
    cutter = routing(parameters)
    list(cutter.gradient_frames(dict(enumerate(gradients)), range(4)))
    assert sources == [gradient.data_ptr() for gradient in gradients]
    for index, gradient in enumerate(gradients):
        for run, part in runs_of(index, gradient.reshape(-1), []):
            cutter.write(run, as_buffer(part))
    assert [parameter.data_ptr() for parameter in parameters] == addresses


def test_rows_are_written_in_place_and_sent_from_where_they_are(monkeypatch):
    sources: list[int] = []
    original = routing_module.as_buffer
    monkeypatch.setattr(
        routing_module, "as_buffer", lambda one: sources.append(one.data_ptr()) or original(one)
    )
    parameter, gradient = torch.zeros(6, 4), torch.randn(6, 4)
    cutter = cut_routing([Cut((6, 4), 0, frozenset({1, 4}))], [parameter])
    list(cutter.gradient_frames({0: gradient}, range(3)))
    assert sources == [gradient[row].data_ptr() for row in (0, 1, 4)]
    first, second = runs_of(1, torch.ones(12), [5])
    assert not cutter.write(first[0], as_buffer(first[1]))
    assert parameter.sum() == 5, "a slice that lies in one piece does not wait until it is whole"
    cutter.write(second[0], as_buffer(second[1]))
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
    original = routing_module.flat_on_cpu
    monkeypatch.setattr(
        routing_module, "flat_on_cpu", lambda one: sizes.append(one.nbytes) or original(one)
    )
    gradient, parameter = torch.randn(500, 2400), torch.zeros(500, 2400)
    cutter = cut_routing([Cut((500, 2400), 1, frozenset({1200}))], [parameter])
    frames = list(cutter.gradient_frames({0: gradient}, range(2)))
    assert max(sizes) <= PAYLOAD_BYTES_MAX < gradient.nbytes / 2
    (first, *_), flat = read_frame(frames[0]).runs, gradient[:, :1200].reshape(-1)
    rows = first.count // 1200
    assert not cutter.write(first, as_buffer(flat[: first.count]))
    assert torch.equal(parameter[:rows, :1200], gradient[:rows, :1200])
    assert not parameter[rows:].any()


def test_a_slice_that_is_in_pieces_is_written_when_the_last_has_come():
    parameter = torch.zeros(3, 4)
    target = cut_routing([Cut((3, 4), 1, frozenset({2}))], [parameter])
    first, second = runs_of(1, torch.arange(1.0, 7.0), [3])  # inside the second row
    target.write(first[0], as_buffer(first[1]))
    assert not parameter.any()
    target.write(second[0], as_buffer(second[1]))
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
    for run, part in runs_of(0, fresh, borders):
        assert not target.write(run, as_buffer(part))
    assert torch.equal(parameter, fresh.view(4, 3))
    assert torch.equal(base, fresh.view(4, 3).t())
    for run, part in runs_of(0, fresh, borders):
        assert target.write(run, as_buffer(part)), "the same bits, said again"


def test_a_strided_view_of_a_larger_tensor_leaves_what_is_between():
    base = torch.zeros(4, 6)
    parameter = base[:, ::2]
    target = Routing(jobs.spec((4, 3)), [parameter])
    for run, part in runs_of(0, torch.ones(12), []):
        target.write(run, as_buffer(part))
    assert torch.equal(base[:, ::2], torch.ones(4, 3))
    assert torch.equal(base[:, 1::2], torch.zeros(4, 3))
    assert torch.equal(received(target.weight_frames([0]))[0], torch.ones(12))


def test_minus_zero_is_another_weight_than_zero():
    parameter = torch.zeros(2)
    target = Routing(jobs.spec((2,)), [parameter])
    ((run, part),) = runs_of(0, torch.tensor([0.0, -0.0]), [])
    assert not target.write(run, as_buffer(part))
    assert torch.equal(torch.signbit(parameter), torch.tensor([False, True]))


def test_not_a_number_is_there_when_it_was_there_before():
    parameter = torch.full((2,), torch.nan)
    target = Routing(jobs.spec((2,)), [parameter])
    ((run, part),) = runs_of(0, parameter.clone(), [])
    assert target.write(run, as_buffer(part))


def test_a_reply_that_was_broken_off_leaves_no_trace_in_the_next():
    parameter = torch.zeros(3, 4).t()
    target = Routing(jobs.spec((4, 3)), [parameter])
    first, *_ = runs_of(0, torch.ones(12), [7])
    target.write(first[0], as_buffer(first[1]))
    for run, part in runs_of(0, torch.ones(12), [7]):
        assert not target.write(run, as_buffer(part)), "none of them was in the parameter"
    assert torch.equal(parameter, torch.ones(4, 3))


def test_it_is_told_whether_weights_were_there_before():
    parameters = tensors()
    target = routing(parameters)
    same = parameters[0].clone().reshape(-1)
    ((run, part),) = runs_of(0, same, [])
    assert target.write(run, as_buffer(part))
    same[-1] += 1
    assert not target.write(run, as_buffer(same))


def test_a_parameter_that_needs_a_gradient_is_written_all_the_same():
    parameter = torch.nn.Parameter(torch.zeros(3))
    target = Routing(jobs.spec((3,)), [parameter])
    ((run, part),) = runs_of(0, torch.ones(3), [])
    target.write(run, as_buffer(part))
    assert torch.equal(parameter.detach(), torch.ones(3))
    assert parameter.requires_grad


@pytest.mark.parametrize(
    "run",
    [
        Run(slice=4, start=0, count=1, dtype=DType.FLOAT32),
        Run(slice=-1, start=0, count=1, dtype=DType.FLOAT32),
        Run(slice=1, start=3, count=3, dtype=DType.FLOAT32),
        Run(slice=1, start=0, count=5, dtype=DType.BFLOAT16),
        *[
            Run(slice=1, start=0, count=5, dtype=DType.FLOAT32, content=content)
            for content in Content
            if content is not Content.WEIGHT
        ],
    ],
    ids=["no slice", "negative", "beyond the end", "another format"]
    + [content.name for content in Content if content is not Content.WEIGHT],
)
def test_a_reply_that_does_not_fit_is_refused_and_writes_nothing(run):
    parameters = tensors()
    before = [parameter.clone() for parameter in parameters]
    with pytest.raises(InvalidFrame):
        routing(parameters).write(run, memoryview(bytes(64)))
    assert all(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))


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
    target = cut_routing(drawn, mine, reply_dtype=wanted)
    assert target.dtypes() == (wire_dtype(wanted),)
    theirs = [torch.randn(one.shape).to(wanted) for one in drawn]
    before = [one.clone() for one in mine]
    for piece in target.slices:
        flat = part_of(theirs[piece.parameter], piece)
        there = torch.equal(
            part_of(before[piece.parameter], piece), flat.to(mine[piece.parameter].dtype)
        )
        came = [
            target.write(run, as_buffer(part))
            for run, part in runs_of(piece.index, flat, data.draw(st.lists(st.integers(1, 9))))
        ]
        assert all(came) == there
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other.to(one.dtype))


def test_a_format_that_is_narrower_than_the_one_wanted_is_rounded_to_nearest():
    parameter = torch.zeros(3, dtype=torch.bfloat16)
    target = Routing(jobs.spec((3,)), [parameter], reply_dtype=torch.float32)
    ((run, part),) = runs_of(0, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]), [])
    assert not target.write(run, as_buffer(part))
    assert parameter.tolist() == [1.0, 1 + 2**-6, 1 + 2**-7], "ties go to even"
    assert target.write(run, as_buffer(part))


def test_the_parameters_own_format_is_refused_where_another_is_wanted():
    parameter = torch.zeros(2)
    target = Routing(jobs.spec((2,)), [parameter], reply_dtype=torch.bfloat16)
    ((run, part),) = runs_of(0, torch.ones(2), [])
    with pytest.raises(InvalidFrame, match="came as FLOAT32, and BFLOAT16 was wanted"):
        target.write(run, as_buffer(part))
    assert not parameter.any()


def test_weights_are_uploaded_in_their_own_format():
    parameter = torch.randn(2)
    cutter = Routing(jobs.spec((2,)), [parameter], reply_dtype=torch.bfloat16)
    assert torch.equal(received(cutter.weight_frames([0]))[0], parameter)


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
