"""One bit for each parameter of a job, as pushes have them."""

from __future__ import annotations

from collections.abc import Iterable


def bits_of(indices: Iterable[int], count: int) -> bytes:
    """`count` bits, least significant first, of which those of `indices` are set."""
    bits = bytearray((count + 7) // 8)
    for index in indices:
        bits[index >> 3] |= 1 << (index & 7)
    return bytes(bits)
