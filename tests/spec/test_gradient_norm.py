"""`max_grad_norm` bounds the mean gradient of all workers, over all shards and parameters."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from tests.spec.conftest import Clusters, tolerance
from tests.spec.crews import MODEL, crew_of, filled, same
from torch import Tensor

SHAPES = {name: MODEL[name] for name in ("vector", "tall", "wide", "kernel")}
STEPS = 8
BOUNDS = {"in every step": 0.1, "in every other step": 30.0, "in no step": 1e6}
"""For which steps the bound is below the norm, which is about 13 and 130 in turn."""


def pushed(step: int) -> list[dict[str, Tensor]]:
    """The gradients of two workers, in every other step ten times as large."""
    scale = 10.0 if step % 2 else 1.0
    one, other = (filled(SHAPES, 10 * step + worker) for worker in (1, 2))
    return [{name: scale * value for name, value in own.items()} for own in (one, other)]


@functools.cache
def trained(clusters: Clusters, kind: str, shards: int, bound: float | None) -> dict[str, Tensor]:
    options = {"slice_bytes": 128, "max_grad_norm": bound}
    with crew_of(clusters.bench(kind, shards), filled(SHAPES, 0), 2, **options) as crew:
        for step in range(STEPS):
            crew.step(*pushed(step))
        return crew.weights()


@functools.cache
def clipped_here(bound: float) -> tuple[dict[str, Tensor], int]:
    """What torch's function and a local optimizer make of it in float64, and how often it binds."""
    weights = {name: torch.nn.Parameter(one.double()) for name, one in filled(SHAPES, 0).items()}
    optimizer, bound_steps = transformers.Adafactor(weights.values()), 0
    for step in range(STEPS):
        one, other = pushed(step)
        for name, weight in weights.items():
            weight.grad = ((one[name] + other[name]) / 2).double()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), bound)
        bound_steps += bool(norm > bound)
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}, bound_steps


WHERE = [("threads", 1), ("threads", 3), ("processes", 4)]


@pytest.mark.parametrize("binds", BOUNDS)
@pytest.mark.parametrize(("kind", "shards"), WHERE)
def test_a_bound_of_the_norm_is_that_of_torch_on_the_mean_gradient(clusters, kind, shards, binds):
    found = trained(clusters, kind, shards, BOUNDS[binds])
    expected, bound_steps = clipped_here(BOUNDS[binds])
    assert bound_steps == {"in every step": 8, "in every other step": 4, "in no step": 0}[binds]
    for name, begun in filled(SHAPES, 0).items():
        off = (found[name].double() - expected[name]).abs().max().item()
        assert off <= tolerance(expected[name], begun.double(), STEPS), name


@pytest.mark.parametrize("binds", BOUNDS)
@pytest.mark.parametrize(("kind", "shards"), WHERE[1:])
def test_a_bound_of_the_norm_has_the_same_bits_on_any_number_of_shards(
    clusters, kind, shards, binds
):
    bound = BOUNDS[binds]
    assert same(trained(clusters, kind, shards, bound), trained(clusters, "threads", 1, bound))


def test_a_bound_that_never_binds_changes_no_bit_and_one_that_binds_does(clusters):
    free = trained(clusters, "threads", 3, None)
    assert same(free, trained(clusters, "threads", 3, BOUNDS["in no step"]))
    assert not same(free, trained(clusters, "threads", 3, BOUNDS["in every other step"]))
