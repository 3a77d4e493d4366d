"""Gradients that are sparse in rows: the rows that were touched travel, and nothing else."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.client.cuts import FORMATS, Cut, cut_routing, cuts, part_of, received, watch_sources
from tests.shard import jobs
from torch import Tensor

from adashard.routing import Routing
from adashard.rows import coalesced_rows, sparse_bits
from adashard.session import Push
from adashard.wire import frames as frames_module
from adashard.wire.errors import InvalidGradient
from adashard.wire.frames import PAYLOAD_BYTES_MAX, leading_frame, read_frame
from adashard.wire.messages import Acknowledge, Content, Run
from adashard.wire.placement import Slice
from adashard.wire.tensors import from_buffer


def sparse(
    shape: tuple[int, ...], rows: list[int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """A row-sparse tensor as autograd might leave it: rows in any order, some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(rows), *shape[1:], generator=generator).to(dtype)
    return from_rows(torch.tensor([rows]).long(), values, shape)


def from_rows(numbers: Tensor, values: Tensor, shape: tuple[int, ...], **options) -> Tensor:
    """Unchecked, as autograd makes them; said aloud, because torch warns otherwise."""
    return torch.sparse_coo_tensor(numbers, values, shape, check_invariants=False, **options)


def sent(cutter: Routing, gradient: Tensor) -> list[bytes]:
    gradients = {0: coalesced_rows("p0", gradient)}
    return list(cutter.gradient_frames(gradients, range(len(cutter.slices))))


def runs_in(frames: list[bytes]) -> list[Run]:
    return [run for frame in frames for run in read_frame(frame).runs]


def filled(frames: list[bytes], slices: tuple[Slice, ...], dtype: torch.dtype) -> dict[int, Tensor]:
    """What a shard makes of the frames: the flat gradient of each slice, once its end has come."""
    zeros = {piece.index: torch.zeros(piece.element_count, dtype=dtype) for piece in slices}
    next_start = dict.fromkeys(zeros, 0)
    ended = {}
    for frame in frames:
        for run, buffer in read_frame(frame).pieces():
            assert run.slice not in ended, "the end of a slice is its last run"
            assert run.start >= next_start[run.slice], "runs ascend"
            next_start[run.slice] = run.start + run.count
            if run.count:
                part = zeros[run.slice][run.start : run.start + run.count]
                part += from_buffer(buffer, run.dtype)
            else:
                assert run.start == slices[run.slice].element_count
                ended[run.slice] = zeros[run.slice]
    return ended


@st.composite
def gradients(draw) -> tuple[Cut, Tensor]:
    cut = draw(cuts(least_axes=1))
    rows = draw(st.lists(st.integers(0, cut.shape[0] - 1), max_size=8))
    return cut, sparse(cut.shape, rows, draw(st.sampled_from(FORMATS)), draw(st.integers(0, 99)))


# --- what travels --------------------------------------------------------------------------------


@given(gradients())
def test_runs_put_into_zeros_are_the_dense_gradient_bit_for_bit(drawn):
    cut, gradient = drawn
    cutter = cut_routing([cut], [torch.zeros(cut.shape)])
    came = filled(sent(cutter, gradient), cutter.slices, gradient.dtype)
    dense = gradient.coalesce().to_dense()
    for piece in cutter.slices:
        assert torch.equal(came[piece.index], part_of(dense, piece))


@given(gradients())
def test_a_sparse_gradient_and_a_dense_one_name_the_same_elements(drawn):
    """So that one worker may push the one, and another worker the other."""
    cut, gradient = drawn
    cutter = cut_routing([cut], [torch.zeros(cut.shape)])
    came = filled(sent(cutter, gradient), cutter.slices, gradient.dtype)
    dense = received(cutter.gradient_frames({0: gradient.to_dense()}, range(len(cutter.slices))))
    assert came.keys() == dense.keys()
    assert all(torch.equal(came[index], flat) for index, flat in dense.items())


@given(gradients())
def test_elements_of_rows_that_were_not_touched_do_not_travel(drawn):
    cut, gradient = drawn
    cutter = cut_routing([cut], [torch.zeros(cut.shape)])
    runs = runs_in(sent(cutter, gradient))
    touched = gradient.coalesce().indices().shape[1]
    assert sum(run.count for run in runs) == touched * math.prod(cut.shape[1:])
    assert all(run.content is Content.WEIGHT for run in runs)


@given(gradients())
def test_rows_beside_each_other_are_one_run(drawn):
    cut, gradient = drawn
    cutter = cut_routing([cut], [torch.zeros(cut.shape)])
    for before, run in itertools.pairwise(runs_in(sent(cutter, gradient))):
        if before.slice == run.slice and run.count:
            assert before.start + before.count < run.start


def test_a_push_is_as_long_as_its_touched_rows():
    shape, width_bytes = (50_000, 64), 64 * 4
    cutter = cut_routing([Cut(shape, 0, frozenset({20_000, 40_000}))], [torch.zeros(shape)])
    for touched in (0, 10, 100, 1000):
        frames = sent(cutter, sparse(shape, [7 * row for row in range(touched)]))
        assert sum(map(len, frames)) <= touched * (width_bytes + 20) + 3 * 20 + len(frames) * 128


def test_sparse_and_dense_gradients_share_a_push():
    cutter = cut_routing([Cut((3, 2)), Cut((4,))], [torch.zeros(3, 2), torch.zeros(4)])
    both = {0: coalesced_rows("p0", sparse((3, 2), [2])), 1: torch.ones(4)}
    (frame,) = cutter.gradient_frames(both, [1, 0])
    assert [(run.slice, run.start, run.count) for run in read_frame(frame).runs] == [
        (1, 0, 4),
        (0, 4, 2),
        (0, 6, 0),
    ]


# --- how it is cut into frames -------------------------------------------------------------------


def test_a_run_longer_than_a_frame_spans_several():
    shape = (5, 200_000)
    gradient = sparse(shape, [1, 2, 4])
    cutter = cut_routing([Cut(shape)], [torch.zeros(shape)])
    frames = sent(cutter, gradient)
    assert len(frames) >= 3
    assert all(len(read_frame(frame).payload) <= PAYLOAD_BYTES_MAX for frame in frames)
    came = filled(frames, cutter.slices, torch.float32)
    assert torch.equal(came[0], gradient.to_dense().reshape(-1))


@pytest.mark.parametrize("touched", [0, 1, 3, 4, 9])
def test_no_frame_has_more_runs_than_are_read(monkeypatch, touched):
    monkeypatch.setattr(frames_module, "RUNS_MAX", 4)
    gradient = sparse((20,), list(range(0, 2 * touched, 2)))
    cutter = cut_routing([Cut((20,))], [torch.zeros(20)])
    frames = sent(cutter, gradient)
    assert len(frames) == -(-(touched + 1) // 4)
    came = filled(frames, cutter.slices, torch.float32)
    assert torch.equal(came[0], gradient.to_dense())


def test_rows_are_sent_from_where_they_are(monkeypatch):
    sources = watch_sources(monkeypatch)
    gradient = coalesced_rows("p0", sparse((6, 2), [0, 1, 4]))
    cutter = cut_routing([Cut((6, 2), 0, frozenset({3}))], [torch.zeros(6, 2)])
    list(cutter.gradient_frames({0: gradient}, range(2)))
    values = gradient.values()
    assert sources == [values[0].data_ptr(), values[2].data_ptr()]


# --- what a gradient may be ----------------------------------------------------------------------


def test_gradients_of_embeddings_add_up_and_stay_as_they_were():
    layer = torch.nn.Embedding(5, 3, sparse=True)
    for rows in ([4, 1, 4], [1]):
        layer(torch.tensor(rows)).square().sum().backward()
    before = layer.weight.grad.clone()
    made = coalesced_rows("weight", layer.weight.grad)
    assert made.is_coalesced()
    assert made.indices().tolist() == [[1, 4]]
    assert not layer.weight.grad.is_coalesced()
    assert torch.equal(layer.weight.grad.to_dense(), before.to_dense())
    assert torch.equal(made.to_dense(), before.coalesce().to_dense())


def test_a_gradient_that_is_wrongly_marked_as_coalesced_is_coalesced():
    numbers, values = torch.tensor([[3, 0, 3]]), torch.tensor([1.0, 2.0, 4.0])
    claimed = from_rows(numbers, values, (5,), is_coalesced=True)
    made = coalesced_rows("p0", claimed)
    assert (made.indices().tolist(), made.values().tolist()) == ([[0, 3]], [2.0, 5.0])


def test_rows_that_are_one_value_in_memory_and_numbers_with_gaps_are_read():
    """As `loss.sum()` leaves them: the values are one row, repeated without a copy."""
    numbers = torch.tensor([[0, 9, 2, 9]])[:, ::2]
    values = torch.ones(1, 1).expand(2, 3)
    made = coalesced_rows("p0", from_rows(numbers, values, (4, 3)))
    cutter = cut_routing([Cut((4, 3))], [torch.zeros(4, 3)])
    came = filled(sent(cutter, made), cutter.slices, torch.float32)
    assert torch.equal(came[0].view(4, 3)[:, 0], torch.tensor([1.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize(
    ("rows", "first"), [([0, 4], 4), ([2, 9, 4, 0], 9), ([-1, 7], -1)], ids=["4", "9", "-1"]
)
def test_a_row_out_of_range_is_refused_with_parameter_and_row(rows, first):
    broken = from_rows(torch.tensor([rows]), torch.ones(len(rows), 2), (4, 2))
    words = f"'wte' has a row {first}, and the parameter has 4 rows"
    with pytest.raises(InvalidGradient, match=words) as no:
        coalesced_rows("wte", broken)
    assert no.value.facts == {"tensor": "wte", "index": str(first)}


@pytest.mark.parametrize(
    ("gradient", "words"),
    [
        (torch.eye(3).to_sparse(), "sparse_coo over 2 axes"),
        (torch.tensor(1.0).to_sparse(), "sparse_coo over 0 axes"),
        (torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "jagged"),
    ],
    ids=["elements", "scalar", "jagged"],
)
def test_what_is_sparse_in_another_way_is_refused_by_name(gradient, words):
    with pytest.raises(InvalidGradient, match=f"gradient of 'wte' is torch.{words}") as no:
        coalesced_rows("wte", gradient)
    assert no.value.facts == {"tensor": "wte"}
    assert "sparse=False" in no.value.remedy


# --- what a push says of them --------------------------------------------------------------------


@given(st.lists(st.sampled_from(["dense", "sparse", "absent"]), min_size=1, max_size=20))
def test_a_push_says_which_gradients_come_in_rows(kinds):
    made = {"dense": torch.ones(2), "sparse": sparse((2,), [1])}
    push = {index: made[kind] for index, kind in enumerate(kinds) if kind in made}
    in_rows = [index for index, kind in enumerate(kinds) if kind == "sparse"]
    assert sparse_bits(push, len(kinds)) == jobs.bits(in_rows, len(kinds))


def test_a_session_says_it_to_the_shards(stage):
    def take(shard, begin, frames):
        yield leading_frame(Acknowledge(version=shard.version, complete=False))
        runs.extend(runs_in(list(frames)))
        shard.take(begin, {})
        yield from shard.reply(begin)

    one, runs = stage(), list[Run]()
    one.open()
    one.shards[0].script.append(take)
    gradients = {0: torch.ones(4), 1: coalesced_rows("p1", sparse((3,), [2]))}
    assert one.session.step(Push(gradients=gradients, settings=one.push().settings))
    (begin,) = one.shards[0].begins
    assert (begin.present, begin.sparse) == (b"\x03", b"\x02")
    assert [(run.slice, run.start, run.count) for run in runs] == [(0, 0, 4), (1, 2, 1), (1, 3, 0)]
