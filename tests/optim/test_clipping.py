"""Root mean squares and the ratio that an update is clipped by."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adashard_server.optim import clipping

positive = st.floats(1e-6, 1e6)


@given(rms=st.floats(0, 1e30), threshold=positive)
def test_a_clipped_update_is_at_the_threshold_at_most_and_never_grows(rms, threshold):
    ratio = clipping.clip_ratio(rms, threshold)
    assert ratio >= 1
    assert rms / ratio <= threshold * (1 + 1e-12)
    assert rms > threshold or ratio == 1


@given(rms=st.floats(0, 1e30))
def test_an_infinite_threshold_clips_nothing(rms):
    assert clipping.clip_ratio(rms, math.inf) == 1


def test_the_rms_of_no_elements_is_zero():
    nothing = torch.zeros(0, 3)
    assert clipping.root_mean_square(clipping.squared_sum(nothing), nothing.numel()) == 0


@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1))
def test_the_squared_sum_is_that_of_exact_arithmetic(values):
    exact = math.fsum(value * value for value in values)
    assert clipping.squared_sum(torch.tensor(values)) == pytest.approx(exact, rel=1e-12, abs=1e-90)


def test_squares_beyond_float32_are_summed():
    assert clipping.squared_sum(torch.tensor([3e30, 4e30])) == pytest.approx(25e60, rel=1e-6)
    assert clipping.squared_sum(torch.tensor([3e-30, 4e-30])) == pytest.approx(25e-60, rel=1e-6)


def test_four_million_elements_are_summed_without_loss():
    """torch's own norm, in float32, was off by 1e-4 here."""
    ones = torch.ones(2**22)
    ones[::2] = 1.1
    exact = 2**21 * (1 + float(torch.tensor(1.1)) ** 2)
    assert clipping.squared_sum(ones) == pytest.approx(exact, rel=1e-9)


def test_a_nan_is_not_hidden():
    assert math.isnan(clipping.squared_sum(torch.tensor([1.0, math.nan])))
