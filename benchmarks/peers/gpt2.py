"""What every peer's parameter server is timed with: GPT-2 small, and the orders of a run.

A run starts a server and two workers, and then measures phases: so many workers at once, and one of
the optimizers. A step is timed by each worker, from the push to the weights in its model's tensors;
the slowest worker counts. Every tensor has a storage of its own: a peer that pickles a view carries
the whole storage along.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from shapes import GPT2_SMALL
from torch import Tensor

WORKERS = (1, 2)
WARM_UP = 2  # steps that are thrown away: memory is touched for the first time

Steps = dict[str, list[float]]


def tensors(seed: int) -> list[Tensor]:
    """Tensors of GPT-2 small's shapes, normal, in storages of their own."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in GPT2_SMALL]


def phase(workers: int, optimizer: str) -> str:
    """The name of a phase in the file of results."""
    return f"{workers} {optimizer}"


def slowest(of_workers: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of each step that counts, from those of all workers."""
    return [max(one) for one in zip(*of_workers, strict=True)][WARM_UP:]


class Mean:
    """The mean of some workers' gradients, formed in the tensors of the first, as they come."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: list[Tensor] = []

    @property
    def empty(self) -> bool:
        """Whether no worker's gradients are in it."""
        return self._count == 0

    def add(self, gradients: list[Tensor]) -> int:
        """Takes a worker's gradients over; how many there are of."""
        self._count += 1
        if self._count == 1:
            self._mean = gradients
        else:
            torch._foreach_lerp_(self._mean, gradients, 1.0 / self._count)
        return self._count

    def take(self) -> list[Tensor]:
        """The mean; the next is begun."""
        mean, self._mean, self._count = self._mean, [], 0
        return mean


def options(description: str | None) -> argparse.Namespace:
    """The command line of every peer's module."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("results", type=Path, help="file to write, for the seconds of all phases")
    parser.add_argument("--steps", type=int, required=True, help="that count, in each phase")
    parser.add_argument("--optimizers", nargs="+", required=True)
    return parser.parse_args()


def save(path: Path, steps: Steps, note: str = "") -> None:
    """Writes the seconds of every step, by phase."""
    path.write_text(json.dumps({"steps": steps, "note": note}))
