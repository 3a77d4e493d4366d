"""Tensors cut along a placement and put back: by views, in any layout and format."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs
from torch import Tensor

from adashard import routing as routing_module
from adashard.routing import Routing
from adashard.wire.errors import InvalidFrame, UnsupportedParameter
from adashard.wire.frames import read_frame
from adashard.wire.messages import Member, Run
from adashard.wire.spec import DType
from adashard.wire.tensors import as_buffer, from_buffer, wire_dtype

SHAPES = ((4, 3), (5,), (), (2, 3, 2))
FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensors(dtypes=(torch.float32,) * 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).to(dtype)
        for shape, dtype in zip(SHAPES, dtypes, strict=True)
    ]


def routing(parameters: list[Tensor]) -> Routing:
    return Routing(jobs.spec(*SHAPES), parameters)


def received(frames) -> dict[int, Tensor]:
    """Flat tensors by slice, from frames."""
    found: dict[int, list[Tensor]] = {}
    for data in frames:
        for run, buffer in read_frame(data).pieces():
            found.setdefault(run.slice, []).append(from_buffer(buffer, run.dtype))
    return {index: torch.cat(parts) for index, parts in found.items()}


def runs_of(index: int, flat: Tensor, borders: list[int]):
    """The elements of a slice, cut at `borders`, as they would arrive."""
    cuts = sorted({0, flat.numel(), *(border for border in borders if border < flat.numel())})
    for start, stop in itertools.pairwise(cuts):
        part = flat[start:stop].contiguous()
        yield Run(slice=index, start=start, count=stop - start, dtype=wire_dtype(flat.dtype)), part


formats = st.tuples(*[st.sampled_from(FORMATS)] * 4)


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


def test_a_gradient_that_is_longer_than_a_frame_is_sent_from_one_place(monkeypatch):
    calls: list[Tensor] = []
    original = routing_module.flat_on_cpu
    monkeypatch.setattr(
        routing_module, "flat_on_cpu", lambda one: calls.append(one) or original(one)
    )
    large = torch.randn(3, 1 << 18).t()  # not row by row: flattening copies it, once
    cutter = Routing(jobs.spec(tuple(large.shape)), [large])
    frames = list(cutter.gradient_frames({0: large}, [0]))
    assert len(frames) > 1
    assert len(calls) == 1
    assert torch.equal(received(frames)[0], large.reshape(-1))


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
    first, *_ = runs_of(0, torch.full((12,), 9.0), [5])
    target.write(first[0], as_buffer(first[1]))
    for run, part in runs_of(0, torch.ones(12), [7]):
        target.write(run, as_buffer(part))
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
    ],
    ids=["no slice", "negative", "beyond the end", "another format"],
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
