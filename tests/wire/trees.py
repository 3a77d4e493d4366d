"""Parameters as nothing but the leaves of their trees."""

from __future__ import annotations

from tests.wire.jobs import job, tensor

from adashard.wire.placement import SLICE_BYTES_MIN, Slice, cut


def leaves_of(*counts: int) -> tuple[Slice, ...]:
    """The slices of parameters that have so many of them, each a power of two."""
    lengths = (count * SLICE_BYTES_MIN // 4 for count in counts)
    parameters = (tensor(f"p{number}", length) for number, length in enumerate(lengths))
    return cut(job(*parameters, slice_bytes=SLICE_BYTES_MIN))
