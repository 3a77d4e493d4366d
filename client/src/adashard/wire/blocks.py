"""How int8 elements lie on the wire: in blocks, each with the scale that its bytes are times of.

A block is `BLOCK_ELEMENTS` elements of a slice, counted from the slice's first; the last one of a
slice may be shorter. Its scale comes first, a float32, then a signed byte for each element. So any
run of whole blocks can be read by itself, and what is left of one without its first blocks is a
part of its bytes.
"""

from __future__ import annotations

BLOCK_ELEMENTS = 1024
SCALE_BYTES = 4
BLOCK_BYTES = SCALE_BYTES + BLOCK_ELEMENTS


def bytes_of(element_count: int) -> int:
    """Bytes of elements from a block's border on."""
    return element_count + SCALE_BYTES * -(-element_count // BLOCK_ELEMENTS)


def elements_of(byte_count: int) -> int:
    """The opposite of `bytes_of`; elements of whole blocks and, if there is one, a shorter last."""
    blocks, rest = divmod(byte_count, BLOCK_BYTES)
    return blocks * BLOCK_ELEMENTS + max(0, rest - SCALE_BYTES)
