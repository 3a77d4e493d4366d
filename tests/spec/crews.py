"""Crews: the workers of one job, which step together, each with gradients of its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from tests.spec.conftest import Bench, Feed, together
from torch import Tensor

from adashard.wire.placement import Slice, cut

Gradients = Mapping[str, Tensor | None]

SLICE_BYTES = 64
"""The least there is: everything of more than 16 elements is cut."""

MODEL = {
    "vector": (40,),
    "tall": (24, 5),
    "wide": (3, 32),
    "square": (8, 8),
    "stack": (3, 4, 5),
    "kernel": (4, 3, 3, 3),
    "scalar": (),
}
"""A tensor of every kind that is cut in a way of its own."""


def filled(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Normal numbers in every shape, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Crew:
    """Workers of one job, in the order of their ranks.

    Ranks are given in the order in which workers join, which is nobody's to say. So they join with
    a step in which nobody has a gradient, and nothing is updated: from then on, all are known.

    Args:
        table: their cluster and their job.
        feeds: the parameters of each.
        state: what all of them load before they join; None for nothing.
        options: of `adashard.Adafactor`.
    """

    def __init__(self, table: Bench, *feeds: Feed, state: dict | None = None, **options) -> None:
        made = [table.adafactor(feed.named(), min_workers=len(feeds), **options) for feed in feeds]
        for optimizer in made:
            if state is not None:
                optimizer.load_state_dict(state)
        together(*(optimizer.step for optimizer in made))
        self.table = table
        self.optimizers = sorted(made, key=lambda optimizer: optimizer.worker_rank)
        self.feeds = [feeds[made.index(optimizer)] for optimizer in self.optimizers]

    def step(self, *gradients: Gradients) -> None:
        """One step of all, with the gradients of each."""
        for feed, own in zip(self.feeds, gradients, strict=True):
            feed.give(own)
        together(*(optimizer.step for optimizer in self.optimizers))

    def weights(self) -> dict[str, Tensor]:
        """The weights that all of them hold."""
        first, *others = (feed.weights() for feed in self.feeds)
        for other in others:
            assert same(first, other), "two workers hold other weights"
        return first

    def slices(self) -> tuple[Slice, ...]:
        """How the job's parameters are cut."""
        return cut(self.optimizers[0]._session.spec)

    def shares(self) -> dict[str, int]:
        """Bytes of state by shard, for shards that have any."""
        by_shard = self.table.get(f"/api/v1/jobs/{self.table.job}/state")["by_shard"]
        return {shard: held for shard, held in by_shard.items() if held}

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        together(*(optimizer.close for optimizer in self.optimizers))


def crew_of(table: Bench, start: Mapping[str, Tensor], workers: int = 1, **options) -> Crew:
    """So many workers that begin with the same weights."""
    return Crew(table, *(Feed(dict(start)) for _ in range(workers)), **options)


def same(one: Mapping[Any, Tensor], other: Mapping[Any, Tensor]) -> bool:
    """Whether all tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
