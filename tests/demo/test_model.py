import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adashard_server.demo.model import Rotation, Size, Transformer

TINY = Size(width=16, depth=2, heads=2, context=12)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(TINY)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(256, (7, TINY.context + 1), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def turned():
    """One query and one key, each turned to every position: two of (30, 8)."""
    vectors = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(2))
    return Rotation(8, context=30)(vectors.expand(2, 30, 8))


@torch.no_grad()
@pytest.mark.parametrize("position", range(TINY.context))
def test_a_byte_changes_the_logits_at_its_place_and_none_before(model, windows, position):
    text = windows[:, :-1]
    other = text.clone()
    other[:, position] = (other[:, position] + 1) % 256
    changed = (model(text) - model(other)).abs().amax(dim=(0, 2))
    assert float(changed[:position].sum()) < 1e-5
    assert float(changed[position]) > 1e-3


@torch.no_grad()
def test_every_byte_is_looked_back_on_from_the_end_of_the_context(model, windows):
    last = model(windows[:, :-1])[:, -1]
    for position in range(TINY.context - 1):
        other = windows[:, :-1].clone()
        other[:, position] = (other[:, position] + 1) % 256
        assert not torch.allclose(model(other)[:, -1], last)


@given(shift=st.integers(0, 20), query=st.integers(0, 9), key=st.integers(0, 9))
def test_a_score_sees_how_far_apart_two_bytes_are_and_not_where(turned, shift, query, key):
    queries, keys = turned
    here = queries[query] @ keys[key]
    there = queries[query + shift] @ keys[key + shift]
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_the_demos_model_has_one_to_three_million_parameters():
    count = sum(parameter.numel() for parameter in Transformer(Size()).parameters())
    assert 1_000_000 <= count <= 3_000_000


def test_every_parameter_takes_part_and_none_begins_at_zero(model, windows):
    model.zero_grad()
    model.loss(windows).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.detach().abs().max()) > 0, name


def test_a_model_that_has_learnt_nothing_does_about_as_well_as_guessing():
    torch.manual_seed(0)
    windows = torch.randint(256, (16, 129))
    assert 8 < Transformer(Size()).bits_per_byte(windows) < 8.3


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_bits_per_byte_do_not_depend_on_how_the_windows_are_batched(model, windows, batch):
    bits = model.loss(windows).item() / math.log(2)
    assert model.bits_per_byte(windows, batch=batch) == pytest.approx(bits, rel=1e-5)
