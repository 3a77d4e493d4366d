"""Adafactor's schedules: beta2 and rho of one step, from a parameter's step count.

Pure functions of numbers. `pow` differs in its last bit between maths libraries, so one worker of
a round computes them for all (the one of lowest rank), and they travel with its push.

References:
    Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018,
    Algorithm 6; the warm-up is that of its experiments.
"""

from __future__ import annotations

import math

RELATIVE_STEP_CAP = 1e-2
"""Largest relative step size of the paper."""

WARMUP_SLOPE = 1e-6
"""What the cap grows by with each step of the paper's warm-up."""


def beta2(step_count: int, decay_rate: float, step_offset: int = 0) -> float:
    """How much of the old second moment step t keeps: beta2_t = 1 - t^decay_rate.

    It is 0 at t = 1, so the average begins with the first gradient and has no bias to correct.
    Old gradients are forgotten for rates from -1 up; -1 is the plain mean of all.

    Args:
        step_count: t, the parameter's own count of updates, the one at hand included; from 1.
        decay_rate: 0 or less; the paper's is -0.8.
        step_offset: 0 or more; t is counted from there on, as with `decay_offset` of t5x and
            optax. Up to there it is taken for 1, so that only the latest gradient counts, where
            those compute NaN.
    """
    return float(1.0 - max(1, step_count - step_offset) ** decay_rate)


def rho(step_count: int, *, lr: float | None, relative_step: bool, warmup_init: bool) -> float:
    """The step size of step t, before it is scaled by the parameter.

    A relative step takes rho_t = min(cap, 1 / sqrt(t)), where the cap is

        1e-2        as in the paper, with `lr` None,
        1e-6 t      with the paper's warm-up,
        lr          as in torch;

    a step that is not relative takes `lr`.

    Args:
        step_count: t, the parameter's own count of updates, the one at hand included; from 1.
        lr: the learning rate, needed where the step is not relative.
        relative_step: whether the step size falls with t.
        warmup_init: whether the cap grows with t.

    Raises:
        ValueError: the step is neither relative, nor is there a learning rate.
    """
    if not relative_step:
        if lr is None:
            raise ValueError("a step that is not relative needs lr")
        return lr
    cap = RELATIVE_STEP_CAP if lr is None else lr
    if warmup_init:
        cap = WARMUP_SLOPE * step_count
    return min(cap, 1.0 / math.sqrt(step_count))
