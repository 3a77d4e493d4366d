"""Gradients in fewer bits: how far from themselves they may be, and what never happens to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adashard.quantize import LEVELS, narrowed, quantized, subtract_quantized
from adashard.wire.blocks import BLOCK_ELEMENTS, bytes_of
from adashard_server.optim.blocks import decoded

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
HALVES = [torch.bfloat16, torch.float16]


@st.composite
def values(draw) -> Tensor:
    """Elements of any size, some of them of another; some blocks zero."""
    count = draw(st.integers(1, 40) | st.integers(1, 3 * BLOCK_ELEMENTS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    made = torch.randn(count, generator=generator) * draw(st.sampled_from([1e-42, 1e-3, 1.0, 1e30]))
    for place, value in draw(st.dictionaries(st.integers(0, count - 1), FINITE)).items():
        made[place] = value
    if draw(st.booleans()):
        made[:BLOCK_ELEMENTS] = 0.0
    return made


def back(sent: Tensor, count: int) -> Tensor:
    return decoded(sent, count)


def scales(sent: Tensor, count: int) -> Tensor:
    """The scale of each element."""
    starts = [bytes_of(start) for start in range(0, count, BLOCK_ELEMENTS)]
    each = torch.stack([sent[start : start + 4] for start in starts]).view(torch.float32).view(-1)
    return each.repeat_interleave(BLOCK_ELEMENTS)[:count]


# --- int8 ----------------------------------------------------------------------------------------


@given(values())
def test_an_element_moves_by_half_a_quantum_at_most_and_zero_stays(made):
    sent = quantized(made)
    came, scale = back(sent, made.numel()), scales(sent, made.numel())
    assert bool(torch.isfinite(came).all())
    normal = scale >= torch.finfo(torch.float32).tiny  # below it the quantum itself is rounded
    distance = (came.double() - made.double()).abs()
    assert bool((distance <= scale.double() * (0.5 + 1e-4))[normal].all())
    assert bool((distance <= made.double().abs() + 1e-44)[~normal].all())
    assert torch.equal(came[made == 0], made[made == 0].abs())
    assert bool((came * made >= 0).all())


@given(values())
def test_it_is_what_numpy_makes_of_it(made):
    sent = quantized(made)
    parts = []
    for block in np.split(made.numpy(), range(BLOCK_ELEMENTS, made.numel(), BLOCK_ELEMENTS)):
        scale = min(np.float32(np.abs(block).max()) / np.float32(LEVELS), np.float32(2.679e36))
        levels = np.zeros_like(block) if scale == 0 else np.rint(block / scale)
        parts += [scale.tobytes(), np.clip(levels, -LEVELS, LEVELS).astype(np.int8).tobytes()]
    assert sent.numpy().tobytes() == b"".join(parts)


@given(values(), st.integers(1, 2))
def test_blocks_that_are_made_apart_are_those_that_are_made_together(made, blocks):
    border = blocks * BLOCK_ELEMENTS
    parts = [quantized(part) for part in (made[:border], made[border:])]
    assert torch.equal(torch.cat(parts), quantized(made))


@given(values())
def test_what_is_left_and_what_was_sent_are_what_there_was_to_the_bit(made):
    rest = made.clone()
    subtract_quantized(rest)
    assert torch.equal(rest + back(quantized(made), made.numel()), made)


def test_halves_become_the_even_level():
    made = torch.tensor([LEVELS, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert back(quantized(made), 6).tolist() == [LEVELS, 0.0, 2.0, 2.0, 0.0, -2.0]


def test_of_no_elements_there_are_no_bytes():
    assert quantized(torch.empty(0)).numel() == 0


# --- halves of float32 ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@given(made=st.lists(FINITE, min_size=1, max_size=20).map(torch.tensor))
def test_a_finite_element_stays_finite_and_is_otherwise_rounded_to_nearest(dtype, made):
    greatest = torch.finfo(dtype).max
    came = narrowed(made, dtype)
    assert bool(torch.isfinite(came).all())
    plain = made.to(dtype)
    assert torch.equal(came[plain.isfinite()], plain[plain.isfinite()])
    assert bool((came[plain.isinf()].abs() == greatest).all())
    assert bool((came.float() * made.sign() >= 0).all())


def test_float16_ends_at_its_largest_number_and_not_at_infinity():
    made = torch.tensor([65504.0, 65519.9, 1e5, -3e38])
    assert narrowed(made, torch.float16).tolist() == [65504.0, 65504.0, 65504.0, -65504.0]


@given(st.permutations(range(3)))
def test_a_part_that_lies_anyhow_comes_row_by_row(order):
    made = torch.randn(4, 3, 5).permute(order)[:, 1:]
    came = narrowed(made, torch.bfloat16)
    assert came.is_contiguous()
    assert torch.equal(came, made.bfloat16())
