"""Compiles the loops of the CPU's passes before the first step needs them.

The first call of a loop compiles it: about ten seconds for all of them on a machine that has no
cache of them yet, a fraction of a second where it has. A step is the wrong moment for that.
"""

from __future__ import annotations

import math

import torch

from adashard_server.optim.adafactor import Settings, new_state
from adashard_server.optim.compiled import CompiledPasses
from adashard_server.optim.factored import Axes
from adashard_server.optim.layout import Layout
from adashard_server.optim.rounding import rounded
from adashard_server.optim.split import SliceStep

_AXES = Axes(0, 1)
_WHOLE = (4, 4)
_BINDS = 10.0  # as a bound of V, for gradients of 1
# Slices that together take every way: whole and cut, by rows and by columns, factored and not.
_SLICES: tuple[tuple[tuple[int, int], Axes | None, int | None], ...] = (
    (_WHOLE, _AXES, None),
    ((2, 4), _AXES, 0),
    ((4, 2), _AXES, 1),
    (_WHOLE, None, None),
)


def compile_ahead() -> None:
    """Takes steps of tiny slices in every way there is. Thread-safe, and cheap the second time."""
    for beta1, eps1 in ((None, _BINDS), (0.9, 0.0)):
        for shape, axes, axis in _SLICES:
            _step(Layout(shape, _WHOLE, axes, axis), _settings(beta1, eps1))
    addend, total = torch.ones(4), torch.zeros(4)
    CompiledPasses.accumulate(total, addend, 1.0, first=True)
    blocks = torch.zeros(8, dtype=torch.uint8)  # 4 elements of int8 and their scale
    CompiledPasses.accumulate(total, blocks, 1.0, first=True)
    for dtype in (torch.bfloat16, torch.float16):
        rounded(addend, dtype, seed=0, slice_index=0, step=1, first=0)


def _step(layout: Layout, settings: Settings) -> None:
    """One step of a slice of ones, as if the others of its parameter had given nothing."""
    momentum = settings.beta1 is not None
    state = new_state(layout.shape, layout.axes, momentum=momentum)
    weight, gradient = torch.ones(math.prod(layout.shape)), torch.ones(math.prod(layout.shape))
    step = SliceStep(layout, settings, beta2=0.5, scale=1.0, passes=CompiledPasses)
    rows = layout.as_matrices(weight).view(-1, layout.matrices[2])
    measured = step.measure(gradient, state, CompiledPasses.square_sum(rows))
    short = measured.short
    if layout.long is not None:
        short = step.short(state, measured.partial)
        step.clamped(gradient, measured, short)
    step.apply(weight, gradient, state, measured, measured.partial, short, rho=0.01)


def _settings(beta1: float | None, eps1: float) -> Settings:
    return Settings(
        eps1=eps1,
        eps2=1e-3,
        clip_threshold=1.0,
        beta1=beta1,
        weight_decay=0.0,
        weight_decay_mode="alpha",
        scale_parameter=True,
        lr=0.0,
        clamp_eps=True,
    )
