"""beta2_t and rho_t, as the paper has them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adashard import schedule

step_counts = st.integers(1, 10**7)
decay_rates = st.floats(-2, 0)


@given(decay_rate=decay_rates)
def test_the_first_step_keeps_nothing_of_a_moment_that_was_never_seen(decay_rate):
    assert schedule.beta2(1, decay_rate) == 0


@given(step_count=step_counts, decay_rate=decay_rates)
def test_beta2_is_the_paper_s_and_never_reaches_one(step_count, decay_rate):
    found = schedule.beta2(step_count, decay_rate)
    assert found == pytest.approx(1 - math.exp(decay_rate * math.log(step_count)))
    assert 0 <= found < 1


@given(step_count=step_counts, decay_rate=decay_rates)
def test_beta2_never_falls(step_count, decay_rate):
    assert schedule.beta2(step_count + 1, decay_rate) >= schedule.beta2(step_count, decay_rate)


@given(steps=st.integers(1, 50), decay_rate=decay_rates)
def test_the_weights_of_all_past_gradients_add_up_to_one(steps, decay_rate):
    """So the moving average has no bias, and nothing corrects one."""
    total = 0.0
    for step_count in range(1, steps + 1):
        kept = schedule.beta2(step_count, decay_rate)
        total = kept * total + (1 - kept)
    assert total == pytest.approx(1)


@given(step_count=step_counts, decay_rate=decay_rates, step_offset=st.integers(0, 10**7))
def test_an_offset_counts_steps_from_there_and_keeps_nothing_before(
    step_count, decay_rate, step_offset
):
    found = schedule.beta2(step_offset + step_count, decay_rate, step_offset)
    assert found == schedule.beta2(step_count, decay_rate)
    assert schedule.beta2(min(step_count, step_offset + 1), decay_rate, step_offset) == 0


@given(steps=st.integers(1, 50))
def test_a_decay_rate_of_minus_one_is_the_plain_mean(steps):
    mean = 0.0
    for step_count in range(1, steps + 1):
        kept = schedule.beta2(step_count, -1)
        mean = kept * mean + (1 - kept) * step_count
    assert mean == pytest.approx((steps + 1) / 2)


@given(step_count=step_counts)
def test_the_relative_step_is_capped_by_the_paper_s_hundredth(step_count):
    found = schedule.rho(step_count, lr=None, relative_step=True, warmup_init=False)
    assert found == (0.01 if step_count <= 10_000 else 1 / math.sqrt(step_count))


@given(step_count=step_counts)
def test_warm_up_raises_the_cap_by_a_millionth_a_step(step_count):
    found = schedule.rho(step_count, lr=None, relative_step=True, warmup_init=True)
    assert found == (1e-6 * step_count if step_count < 10_000 else 1 / math.sqrt(step_count))


@given(step_count=step_counts, lr=st.floats(0, 10))
def test_a_learning_rate_caps_the_relative_step_as_in_torch(step_count, lr):
    found = schedule.rho(step_count, lr=lr, relative_step=True, warmup_init=False)
    assert found == min(lr, 1 / math.sqrt(step_count))


@given(step_count=step_counts, lr=st.floats(0, 10))
def test_a_step_that_is_not_relative_is_the_learning_rate_at_any_time(step_count, lr):
    assert schedule.rho(step_count, lr=lr, relative_step=False, warmup_init=False) == lr


def test_a_step_that_is_neither_relative_nor_given_is_refused():
    with pytest.raises(ValueError, match="lr"):
        schedule.rho(1, lr=None, relative_step=False, warmup_init=False)
