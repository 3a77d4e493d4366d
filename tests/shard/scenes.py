"""Scenes that tests of the engine begin with, and what they compare with."""

from __future__ import annotations

import torch
from tests.shard import jobs
from tests.shard.tables import Table

SPEC = jobs.spec((4, 3), (5,), ())


def values(seed: int, scale: float = 1.0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        index: scale * torch.randn(parameter.shape, generator=generator)
        for index, parameter in enumerate(SPEC.parameters)
    }


def opened(names=("s0",), *, early_bytes_max: int | None = None, **options) -> Table:
    """Shards that hold the weights of `values(0)` at version 0 and collect step 1."""
    table = Table(names)
    table.open(jobs.plan(jobs.entry(SPEC, shards=names, **options)), values(0))
    if early_bytes_max is not None:
        table.leave_room(early_bytes_max)
    return table


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[index].reshape(-1), other[index].reshape(-1)) for index in one
    )


def in_rank_order(*gradients, shares):
    """The mean as a shard forms it: added in float32, one after the other, then divided.

    The shares add up to a power of two, by which a shard divides no worse than this does.
    """
    total = {index: one * shares[0] for index, one in gradients[0].items()}
    for gradient, share in zip(gradients[1:], shares[1:], strict=True):
        for index, one in gradient.items():
            total[index].add_(one, alpha=share)
    return {index: one / sum(shares) for index, one in total.items()}


def alone(*steps) -> dict[int, torch.Tensor]:
    """The weights after these mean gradients, with one worker on one shard."""
    table = opened()
    for step, gradient in enumerate(steps, start=1):
        reply = table.step(jobs.begin(table.entry, "a", step, version=step - 1), gradient)
    return reply.weights
