"""Tensors as bytes: no format is lost and nothing is copied on the way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adashard.wire.errors import InvalidFrame, UnsupportedParameter
from adashard.wire.frames import ITEM_BYTES
from adashard.wire.spec import DType
from adashard.wire.tensors import (
    as_buffer,
    flat_on_cpu,
    from_buffer,
    row_by_row,
    torch_dtype,
    wire_dtype,
)

DTYPES = sorted(ITEM_BYTES)


@given(st.sampled_from(DTYPES), st.data())
def test_bits_come_back_as_they_were_in_every_format(dtype, data):
    count = data.draw(st.integers(1, 20))
    size = count * ITEM_BYTES[dtype]
    bits = data.draw(st.binary(min_size=size, max_size=size))
    tensor = from_buffer(memoryview(bits), dtype)
    assert (tensor.dtype, tensor.shape) == (torch_dtype(dtype), (count,))
    assert bytes(as_buffer(tensor)) == bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_format_of_the_wire_is_one_of_torch(dtype):
    assert wire_dtype(torch_dtype(dtype)) is dtype
    assert ITEM_BYTES[dtype] == torch_dtype(dtype).itemsize


def test_elements_are_little_endian():
    assert bytes(as_buffer(torch.tensor([1.0]))) == b"\x00\x00\x80\x3f"
    assert bytes(as_buffer(torch.tensor([1.0], dtype=torch.bfloat16))) == b"\x80\x3f"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_a_format_that_cannot_be_trained_is_refused_with_those_that_can(dtype):
    with pytest.raises(UnsupportedParameter, match=r"torch.float32, torch.bfloat16") as refused:
        wire_dtype(dtype)
    assert refused.value.facts == {"dtype": str(dtype)}


def test_elements_without_a_format_cannot_be_read():
    with pytest.raises(InvalidFrame, match="UNSPECIFIED"):
        from_buffer(memoryview(b"1234"), DType.UNSPECIFIED)


@given(st.sampled_from(DTYPES), st.lists(st.integers(1, 4), max_size=3), st.data())
def test_bytes_of_any_part_of_a_tensor_are_its_elements_row_by_row(dtype, shape, data):
    numbers = torch.randn([size + 2 for size in shape]).to(torch_dtype(dtype))
    part = numbers.permute(data.draw(st.permutations(range(len(shape)))))
    for axis, size in enumerate(part.shape):
        start = data.draw(st.integers(0, size - 1))
        part = part.narrow(axis, start, data.draw(st.integers(1, size - start)))
    assert bytes(row_by_row(part)) == bytes(as_buffer(flat_on_cpu(part)))


def test_bytes_of_a_tensor_are_its_memory():
    tensor = torch.zeros(3, requires_grad=True)
    buffer = as_buffer(tensor)
    with torch.no_grad():
        tensor[1] = 1.0
    assert bytes(buffer) == bytes(4) + b"\x00\x00\x80\x3f" + bytes(4)


def test_a_tensor_over_bytes_is_their_memory():
    data = bytearray(8)
    tensor = from_buffer(memoryview(data), DType.FLOAT32)
    data[4:] = b"\x00\x00\x80\x3f"
    assert tensor.tolist() == [0.0, 1.0]


def test_a_row_major_tensor_is_flattened_without_a_copy():
    matrix = torch.arange(6.0).reshape(2, 3)
    assert flat_on_cpu(matrix).data_ptr() == matrix.data_ptr()
    assert flat_on_cpu(torch.tensor(2.0)).tolist() == [2.0]


def test_a_tensor_of_another_layout_is_flattened_row_by_row():
    matrix = torch.arange(6.0).reshape(3, 2).t()
    assert flat_on_cpu(matrix).tolist() == [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]


@pytest.mark.parametrize(
    "tensor", [torch.arange(6.0)[::2], torch.arange(2.0)[::2], torch.ones(()).expand(3)]
)
def test_a_tensor_with_gaps_or_repetitions_is_flattened_into_one_piece(tensor):
    flat = flat_on_cpu(tensor)
    assert flat.is_contiguous()
    assert bytes(as_buffer(flat)) == bytes(
        as_buffer(tensor.clone(memory_format=torch.contiguous_format))
    )
