"""What is compiled ahead is all that a step needs."""

from __future__ import annotations

import numba
import pytest
import torch
from tests.optim.slices import CutParameter

from adashard_server.optim.adafactor import Settings
from adashard_server.optim.compilation import compile_ahead
from adashard_server.optim.compiled import CompiledPasses
from adashard_server.optim.factored import Axes
from adashard_server.optim.kernels import cpu

SETTINGS = Settings(
    eps1=1e-30,
    eps2=1e-3,
    clip_threshold=1.0,
    beta1=None,
    weight_decay=0.1,
    weight_decay_mode="alpha",
    scale_parameter=True,
    lr=0.0,
    clamp_eps=False,
)


def compiled() -> dict[str, int]:
    """How many signatures of each loop that is called from outside have been compiled."""
    return {
        name: len(loop.signatures)
        for name, loop in vars(cpu).items()
        if isinstance(loop, numba.core.dispatcher.Dispatcher) and not name.startswith("_")
    }


@pytest.mark.parametrize(("axes", "axis"), [(Axes(0, 1), 0), (Axes(0, 1), 1), (None, 0)])
def test_a_step_compiles_nothing_that_was_not_compiled_ahead(axes, axis):
    compile_ahead()
    before = compiled()
    assert all(before.values()), [name for name, count in before.items() if not count]
    parameter = CutParameter(
        torch.randn(8, 12), axes, SETTINGS, axis=axis, count=2, passes=CompiledPasses
    )
    parameter.step(torch.randn(8, 12), beta2=0.0, rho=0.01)
    assert compiled() == before
