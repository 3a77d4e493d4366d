"""Stochastic rounding of float32 to half its width, compiled; in integers, so exact everywhere.

A number's last bits are dropped after a random number of as many bits has been added to it: the
sum carries into the bits that stay as often as the dropped ones are large. So the mean over all
random numbers is the number itself, and one that has nothing to drop stays as it is.

Random numbers are those of SplitMix64, of which each can be had without those before it.

References:
    Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014, Figure 17.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

_u32, _u64 = np.uint32, np.uint64
_compiled = numba.njit(nogil=True, error_model="numpy", cache=True)

_GAMMA = _u64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _u64(0xBF58476D1CE4E5B9), _u64(0x94D049BB133111EB)

_SIGN, _MAGNITUDE, _INFINITE = _u32(0x80000000), _u32(0x7FFFFFFF), _u32(0x7F800000)
_BF16_LARGEST = _u32(0x7F7F0000)
_FP16_LARGEST = _u32(0x477FE000)  # 65504
_FP16_HALFWAY = _u32(0x477FF000)  # 65520, between the largest number and what would follow it
_FP16_NORMAL = _u32(0x38800000)  # 2^-14
_FP16_REBIAS = _u32((127 - 15) << 10)


@_compiled
def random_bits(key: np.uint64, position: int) -> np.uint64:
    """The 64 random bits at a position of the sequence that `key` begins."""
    bits = key + (_u64(position) + _u64(1)) * _GAMMA
    bits = (bits ^ (bits >> _u64(30))) * _FIRST
    bits = (bits ^ (bits >> _u64(27))) * _SECOND
    return bits ^ (bits >> _u64(31))


@_compiled
def _bf16(magnitude: np.uint32, random: np.uint64) -> np.uint32:
    """The bits of a bfloat16; above its largest finite number rounded to nearest, ties to even."""
    if magnitude > _INFINITE:
        return (magnitude >> _u32(16)) | _u32(0x40)  # stays NaN, whichever bits are dropped
    if magnitude == _INFINITE:
        return magnitude >> _u32(16)
    if magnitude > _BF16_LARGEST:
        return (magnitude + _u32(0x8000)) >> _u32(16)
    return (magnitude + _u32(random >> _u64(48))) >> _u32(16)


@_compiled
def _fp16(magnitude: np.uint32, random: np.uint64) -> np.uint32:
    """The bits of a float16; above its largest finite number rounded to nearest, ties to even."""
    if magnitude > _INFINITE:
        return _u32(0x7E00)
    if magnitude > _FP16_LARGEST:
        return _u32(0x7C00) if magnitude >= _FP16_HALFWAY else _u32(0x7BFF)
    if magnitude >= _FP16_NORMAL:
        return ((magnitude + _u32(random >> _u64(51))) >> _u32(13)) - _FP16_REBIAS
    return _fp16_subnormal(magnitude, random)


@_compiled
def _fp16_subnormal(magnitude: np.uint32, random: np.uint64) -> np.uint32:
    """A multiple of 2^-24. Below 2^-63 it is 0: the chance of 2^-24 would be less than 2^-39."""
    exponent = magnitude >> _u32(23)
    if exponent < _u32(127 - 63):
        return _u32(0)
    dropped = _u64(126) - _u64(exponent)
    mantissa = _u64((magnitude & _u32(0x7FFFFF)) | _u32(0x800000))
    return _u32((mantissa + (random >> (_u64(64) - dropped))) >> dropped)


@_compiled
def to_bf16(
    values: NDArray[np.uint32], key: np.uint64, first: int, out: NDArray[np.uint16]
) -> None:
    """Rounds float32, given as their bits; `first` is the position of the first. Writes `out`."""
    for at in range(values.size):
        random = random_bits(key, first + at)
        sign = (values[at] & _SIGN) >> _u32(16)
        out[at] = sign | _bf16(values[at] & _MAGNITUDE, random)


@_compiled
def to_fp16(
    values: NDArray[np.uint32], key: np.uint64, first: int, out: NDArray[np.uint16]
) -> None:
    """The same to float16."""
    for at in range(values.size):
        random = random_bits(key, first + at)
        sign = (values[at] & _SIGN) >> _u32(16)
        out[at] = sign | _fp16(values[at] & _MAGNITUDE, random)
