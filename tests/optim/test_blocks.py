"""Addends in int8: what is added is byte times scale in float32, to the bit, however it is cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adashard.wire import blocks as contract
from adashard_server.optim.blocks import BLOCK_ELEMENTS, decoded
from adashard_server.optim.compiled import CompiledPasses

SPECIAL = (0.0, 1.0, -0.5, 1e-45, 1e-40, 3e38, float("inf"), float("nan"))


@st.composite
def blocks(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales, levels, and the bytes that they travel in."""
    count = draw(st.integers(1, 40) | st.integers(1, 3000))
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    block_count = -(-count // BLOCK_ELEMENTS)
    scales = generator.standard_normal(block_count).astype(np.float32) ** 7
    for place in draw(st.sets(st.integers(0, block_count - 1))):
        scales[place] = draw(st.sampled_from(SPECIAL))
    levels = generator.integers(-128, 128, count).astype(np.int8)
    parts = [
        scales[block : block + 1].tobytes()
        + levels[block * BLOCK_ELEMENTS : (block + 1) * BLOCK_ELEMENTS].tobytes()
        for block in range(block_count)
    ]
    return scales, levels, np.frombuffer(b"".join(parts), np.uint8)


def plain(scales: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """What the bytes stand for."""
    with np.errstate(invalid="ignore", over="ignore"):
        return levels.astype(np.float32) * np.repeat(scales, BLOCK_ELEMENTS)[: levels.size]


def same_bits(one: Tensor, other: np.ndarray) -> bool:
    """NaN may have any sign."""
    return np.array_equal(one.numpy(), other, equal_nan=True) and np.array_equal(
        np.signbit(one.numpy()[~np.isnan(other)]), np.signbit(other[~np.isnan(other)])
    )


def test_the_contract_and_the_loops_mean_the_same_blocks():
    assert contract.BLOCK_ELEMENTS == BLOCK_ELEMENTS


@given(blocks())
def test_bytes_stand_for_themselves_times_the_scale_rounded_to_float32(drawn):
    scales, levels, data = drawn
    assert same_bits(decoded(torch.from_numpy(data.copy()), levels.size), plain(scales, levels))


@given(blocks(), st.sampled_from([1.0, 0.5, 1 / 3]), st.booleans())
def test_the_compiled_loop_adds_what_numpy_adds(drawn, share, first):
    scales, levels, data = drawn
    total = np.random.default_rng(1).standard_normal(levels.size).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = plain(scales, levels) * np.float32(share)
        expected = scaled if first else total + scaled
    found = torch.from_numpy(total.copy())
    CompiledPasses.accumulate(found, torch.from_numpy(data.copy()), share, first=first)
    assert same_bits(found, expected)


@given(blocks(), st.sets(st.integers(1, 2)))
def test_blocks_that_are_added_one_by_one_make_the_same_sum(drawn, borders):
    _, levels, data = drawn
    whole, cut = torch.ones(levels.size), torch.ones(levels.size)
    addend = torch.from_numpy(data.copy())
    CompiledPasses.accumulate(whole, addend, 0.3, first=False)
    marks = [0, *(border * BLOCK_ELEMENTS for border in sorted(borders)), levels.size]
    marks = sorted({min(mark, levels.size) for mark in marks})
    for start, stop in itertools.pairwise(marks):
        part = addend[contract.bytes_of(start) : contract.bytes_of(stop)]
        CompiledPasses.accumulate(cut[start:stop], part, 0.3, first=False)
    assert same_bits(cut, whole.numpy())


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_scales_need_not_lie_at_a_multiple_of_four(offset):
    data = np.concatenate([np.zeros(offset, np.uint8), np.frombuffer(b"\0\0\0\x40\x03", np.uint8)])
    total = torch.zeros(1)
    CompiledPasses.accumulate(total, torch.from_numpy(data)[offset:], 1.0, first=True)
    assert total.tolist() == [6.0]
