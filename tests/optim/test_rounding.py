"""Rounding whose mean is exact, from random numbers that everybody can draw again."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adashard_server.optim.kernels.rounding import random_bits
from adashard_server.optim.rounding import rounded

DTYPES = [torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)
keys = st.fixed_dictionaries(
    {
        "seed": st.integers(-(2**63), 2**63 - 1),
        "slice_index": st.integers(0, 2**31),
        "step": st.integers(0, 2**40),
        "first": st.integers(0, 2**40),
    }
)
KEY = {"seed": 7, "slice_index": 3, "step": 11, "first": 0}
COUNT = 100_000

float32s = st.floats(width=32, allow_nan=False)
# Of either format, or next to one of its numbers, or subnormal in it.
near = st.builds(
    lambda value, exponent: math.ldexp(value, exponent),
    st.floats(1, 2, width=32, exclude_max=True),
    st.integers(-26, 15),
)
numbers = st.lists(float32s | near, max_size=70)


def neighbours(value, dtype):
    """The largest number of the format that is not above, and the least that is not below."""
    nearest = torch.tensor(value).to(dtype)
    down, up = (torch.tensor(side).to(dtype) for side in (-math.inf, math.inf))
    if nearest.item() == value:
        return value, value
    if nearest.item() < value:
        return nearest.item(), torch.nextafter(nearest, up).item()
    return torch.nextafter(nearest, down).item(), nearest.item()


def share_up(value, dtype, count=COUNT, **key):
    """How often a number goes to the neighbour that is further from zero."""
    found = rounded(torch.full((count,), value), dtype, **(KEY | key))
    down, up = neighbours(value, dtype)
    far = up if value > 0 else down
    assert set(found.tolist()) <= {down, up}
    return float((found == far).double().mean())


# --- where numbers go -----------------------------------------------------------------------------


@given(values=numbers, dtype=dtypes, key=keys)
def test_every_number_goes_to_one_of_its_two_neighbours(values, dtype, key):
    found = rounded(torch.tensor(values), dtype, **key)
    assert found.dtype == dtype
    assert found.shape == (len(values),)
    for value, result in zip(values, found.tolist(), strict=True):
        if abs(value) > torch.finfo(dtype).max:
            assert result == torch.tensor(value).to(dtype).item()
        else:
            assert result in neighbours(value, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_numbers_of_the_format_stay_as_they_are(dtype):
    """All 65,536, zeros with their signs and infinities among them; NaN stays NaN."""
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    found = rounded(everything.float(), dtype, **KEY)
    numbers = ~everything.isnan()
    assert torch.equal(found[numbers].view(torch.int16), everything[numbers].view(torch.int16))
    assert found[~numbers].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan_whichever_of_its_bits_are_set(dtype):
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0x7F80FFFF], dtype=torch.int32)
    values = torch.cat([payloads, payloads | (-(2**31))]).view(torch.float32)
    assert rounded(values, dtype, **KEY).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beyond_the_largest_finite_number_rounding_is_to_nearest(dtype):
    largest = torch.tensor(torch.finfo(dtype).max)
    bits = largest.view(torch.int32) + torch.arange(1, 2**16, dtype=torch.int32)
    values = bits.view(torch.float32)
    values = torch.cat([values, -values])
    assert torch.equal(rounded(values, dtype, **KEY), values.to(dtype))


def test_a_worker_that_gets_steps_of_a_thousandth_moves():
    """200 steps of 1e-3 from 1.0, whose neighbour in bfloat16 is 1 - 2^-8."""
    weight, seen = torch.ones(1000), torch.ones(1000, dtype=torch.bfloat16)
    for step in range(1, 201):
        weight -= 1e-3
        seen = rounded(weight, torch.bfloat16, **(KEY | {"step": step}))
    assert seen.double().mean() == pytest.approx(0.8, abs=1e-3)


# --- with which chance ----------------------------------------------------------------------------


@given(values=st.lists(near | near.map(lambda value: -value), max_size=20), dtype=dtypes, key=keys)
def test_a_number_goes_up_just_where_its_random_bits_reach_over(values, dtype, key):
    """As the definition has it, in fractions: one chance in 2^64 for each value of the bits."""
    start = key_of(key)
    found = rounded(torch.tensor(values), dtype, **key).tolist()
    for position, (value, result) in enumerate(zip(values, found, strict=True)):
        down, up = (abs(number) for number in neighbours(value, dtype))
        near_zero, far = sorted((down, up))
        if near_zero == far or abs(value) > torch.finfo(dtype).max:
            continue
        chance = (Fraction(abs(value)) - Fraction(near_zero)) / (
            Fraction(far) - Fraction(near_zero)
        )
        dropped = chance.denominator.bit_length() - 1
        bits = int(random_bits(np.uint64(start), key["first"] + position))
        goes = Fraction(bits, 2**64) >= 1 - chance
        assert dropped <= 64
        assert abs(result) == (far if goes else near_zero)


def key_of(key):
    """What a sequence of random numbers begins with."""
    start = 0
    for name in ("seed", "slice_index", "step"):
        start = int(random_bits(np.uint64((start + key[name]) % 2**64), 0))
    return start


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chance", [1 / 64, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("exponent", [0, 9, -14, -16, -20, -30])
def test_the_mean_of_many_is_the_number(dtype, chance, exponent):
    """Within five standard deviations; for float16 also where it has fewer bits, or just one."""
    bits = 7 if dtype == torch.bfloat16 else 10
    unit = 2.0 ** (exponent - bits)
    if dtype == torch.float16:
        unit = max(unit, 2.0**-24)
    base = 2.0**exponent if unit < 2.0**exponent else 0.0
    value = torch.tensor(base + chance * unit).item()
    down, up = neighbours(value, dtype)
    expected = (value - down) / (up - down)
    allowed = 5 * math.sqrt(expected * (1 - expected) / COUNT) + 1e-12
    for signed in (value, -value):
        assert share_up(signed, dtype) == pytest.approx(expected, abs=allowed)


def test_next_to_nothing_is_nothing_in_float16():
    values = torch.full((COUNT,), 2.0**-70)
    assert not rounded(values, torch.float16, **KEY).any()


# --- random numbers -------------------------------------------------------------------------------


def test_the_random_numbers_are_those_of_splitmix64():
    found = [int(random_bits(np.uint64(1234567), position)) for position in range(5)]
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(
    seed=st.integers(0, 2**32 - 1),
    borders=st.sets(st.integers(0, 300), max_size=6),
    dtype=dtypes,
    key=keys,
)
def test_pieces_of_a_slice_are_rounded_as_the_whole(seed, borders, dtype, key):
    values = torch.randn(300, generator=torch.Generator().manual_seed(seed))
    ends = [0, *sorted(borders), 300]
    pieces = [
        rounded(values[start:stop], dtype, **(key | {"first": key["first"] + start}))
        for start, stop in itertools.pairwise(ends)
    ]
    assert torch.equal(torch.cat(pieces), rounded(values, dtype, **key))


@pytest.mark.parametrize("name", ["seed", "slice_index", "step", "first"])
@pytest.mark.parametrize("other", [1, 2, 2**20])
def test_another_seed_slice_step_or_place_draws_independently(name, other):
    """Two fair coins agree half of the time: within five standard deviations."""
    values = torch.full((COUNT,), 1 + 2.0**-8)
    key = KEY | {name: KEY[name] + other}
    one, two = (rounded(values, torch.bfloat16, **draw) for draw in (KEY, key))
    agreement = float((one == two).double().mean())
    assert agreement == pytest.approx(0.5, abs=2.5 / math.sqrt(COUNT))


def test_the_bits_that_are_added_are_uniform():
    """Chi-squared over the 256 values of the upper 8 bits: mean 255, deviation 22.6."""
    bits = torch.tensor([int(random_bits(np.uint64(99), at)) >> 56 for at in range(50_000)])
    counts = torch.bincount(bits, minlength=256).double()
    expected = len(bits) / 256
    assert float(((counts - expected) ** 2 / expected).sum()) == pytest.approx(255, abs=5 * 22.6)


def test_neighbouring_elements_draw_independently():
    values = torch.full((COUNT,), 1 + 2.0**-8)
    up = rounded(values, torch.bfloat16, **KEY) > 1
    for distance in (1, 2, 3, 64):
        agreement = float((up[distance:] == up[:-distance]).double().mean())
        assert agreement == pytest.approx(0.5, abs=2.6 / math.sqrt(COUNT))
