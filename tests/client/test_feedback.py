"""Error feedback: nothing of a gradient is lost, and nothing of it is sent twice."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.client.cuts import Cut, cuts, part_of
from torch import Tensor

from adashard.feedback import Feedback
from adashard.quantize import LEVELS, quantized
from adashard.wire.placement import Slice
from adashard_server.optim.blocks import decoded


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def slices(cut: Cut) -> list[Slice]:
    return list(cut.slices(0, 0))


def view(tensor: Tensor, piece: Slice) -> Tensor:
    return (
        tensor.narrow(piece.axis, piece.start, piece.stop - piece.start) if piece.shape else tensor
    )


def sent(feedback: Feedback, push: int, cut: Cut, whole: Tensor) -> list[Tensor]:
    """The bytes of one push, by slice."""
    return [quantized(feedback.to_send(push, piece, view(whole, piece))) for piece in slices(cut)]


def received(cut: Cut, blocks: list[Tensor]) -> Tensor:
    """What a shard reads of them, one slice after the other."""
    return torch.cat(
        [decoded(one, piece.element_count) for one, piece in zip(blocks, slices(cut), strict=True)]
    )


def in_slices(cut: Cut, whole: Tensor) -> Tensor:
    return torch.cat([part_of(whole, piece) for piece in slices(cut)])


def residual(feedback: Feedback, cut: Cut) -> Tensor:
    return feedback.saved([torch.zeros(cut.shape)]).get(0, torch.zeros(cut.shape))


@given(cuts(), st.integers(1, 6))
def test_all_that_was_sent_is_the_sum_of_all_gradients_but_for_half_a_quantum(cut, steps):
    feedback, total, asked = Feedback(), torch.zeros(0), torch.zeros(cut.shape).double()
    for step in range(steps):
        push, whole = feedback.begin(), gradient(cut.shape, step)
        came = received(cut, sent(feedback, push, cut, whole)).double()
        total = came if step == 0 else total + came
        asked += whole
        feedback.end(push, {0: whole}, used=True)
    left = (in_slices(cut, asked) - total).abs()
    assert float(left.max()) <= 0.5 * 6.0 / LEVELS * 1.01  # no sum here is above 6
    rest = in_slices(cut, residual(feedback, cut))
    assert torch.allclose(rest.double(), in_slices(cut, asked) - total, atol=1e-5)


@given(cuts(), st.lists(st.sampled_from(["again", "part"]), max_size=4))
def test_a_push_that_is_repeated_sends_the_same_bytes(cut, attempts):
    feedback = Feedback()
    first = feedback.begin()
    sent(feedback, first, cut, gradient(cut.shape, 1))
    feedback.end(first, {0: gradient(cut.shape, 1)}, used=True)
    push, whole = feedback.begin(), gradient(cut.shape, 2)
    if "part" in attempts:
        feedback.to_send(push, slices(cut)[0], view(whole, slices(cut)[0]))
    expected = sent(feedback, push, cut, whole)
    for _ in attempts:
        again = sent(feedback, push, cut, whole)
        assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


@given(cuts(), st.integers(0, 3))
def test_a_push_that_was_not_used_leaves_what_was_there_before_it(cut, reached):
    """Also where only some of its slices had been asked for."""
    feedback = Feedback()
    first = feedback.begin()
    sent(feedback, first, cut, gradient(cut.shape, 1))
    feedback.end(first, {0: gradient(cut.shape, 1)}, used=True)
    before = residual(feedback, cut)
    push, whole = feedback.begin(), gradient(cut.shape, 2)
    for piece in slices(cut)[:reached]:
        feedback.to_send(push, piece, view(whole, piece))
    feedback.end(push, {0: whole}, used=False)
    assert torch.allclose(residual(feedback, cut), before, rtol=0, atol=1e-6)


def test_a_stream_of_a_push_that_is_over_changes_nothing():
    cut, feedback = Cut((6,)), Feedback()
    (piece,) = slices(cut)
    push = feedback.begin()
    feedback.to_send(push, piece, torch.ones(6))
    feedback.end(push, {0: torch.ones(6)}, used=False)
    late = feedback.to_send(push, piece, torch.full((6,), 5.0))
    assert late.tolist() == [0.0] * 6
    feedback.begin()
    feedback.to_send(push, piece, torch.full((6,), 5.0))
    assert residual(feedback, cut).tolist() == [0.0] * 6


def test_a_parameter_without_a_gradient_keeps_what_it_has_left():
    cut, feedback = Cut((5,)), Feedback()
    push, whole = feedback.begin(), gradient((5,), 1)
    sent(feedback, push, cut, whole)
    feedback.end(push, {0: whole}, used=True)
    before = residual(feedback, cut)
    push = feedback.begin()
    feedback.end(push, {}, used=False)
    assert torch.equal(residual(feedback, cut), before)
    assert before.abs().max() > 0


@given(cuts(), st.integers(1, 4))
def test_who_goes_on_from_what_was_saved_sends_the_same_bytes(cut, steps):
    through = Feedback()
    for step in range(steps):
        push = through.begin()
        sent(through, push, cut, gradient(cut.shape, step))
        through.end(push, {0: gradient(cut.shape, step)}, used=True)
    resumed = Feedback()
    resumed.load(through.saved([torch.zeros(cut.shape)]))
    whole = gradient(cut.shape, steps)
    one, other = (sent(each, each.begin(), cut, whole) for each in (through, resumed))
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_saving_does_not_change_what_is_sent_next():
    cut, feedback, silent = Cut((9, 4), 1, frozenset({2})), Feedback(), Feedback()
    for step in range(3):
        whole = gradient(cut.shape, step)
        pushes = [(one, one.begin()) for one in (feedback, silent)]
        both = [sent(one, push, cut, whole) for one, push in pushes]
        assert all(torch.equal(*pair) for pair in zip(*both, strict=True))
        for one, push in pushes:
            one.end(push, {0: whole}, used=True)
        feedback.saved([torch.zeros(cut.shape)])


def test_what_was_loaded_and_not_reached_is_saved_again_and_not_written_to():
    loaded = {0: torch.tensor([0.25, 0.5]), 1: torch.tensor([1.0])}
    feedback = Feedback()
    feedback.load(loaded)
    push = feedback.begin()
    feedback.to_send(push, slices(Cut((2,)))[0], torch.tensor([3.0, 127.0]))
    feedback.end(push, {}, used=True)
    again = feedback.saved([torch.zeros(2), torch.zeros(1)])
    assert again[1].tolist() == [1.0]
    assert loaded[0].tolist() == [0.25, 0.5]
    feedback.forget()
    assert feedback.saved([torch.zeros(2), torch.zeros(1)]) == {}


def test_a_sum_beyond_float32_ends_at_its_largest_number():
    greatest = torch.finfo(torch.float32).max
    feedback = Feedback()
    feedback.load({0: torch.tensor([greatest])})
    total = feedback.to_send(feedback.begin(), slices(Cut((1,)))[0], torch.tensor([greatest]))
    assert total.tolist() == [greatest]
