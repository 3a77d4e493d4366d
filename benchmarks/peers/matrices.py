"""The matrices that every system trains, and their way into its process and back.

They are made once and read by every system from one file, so all start from the same bits. Nothing
but numpy is imported: the oldest environment that reads this has numpy 1.23.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]

ROWS, COLUMNS, STEPS = 256, 128, 5
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Training:
    """A matrix, and the gradient of every step.

    Attributes:
        weights: float32 (ROWS, COLUMNS), before the first step.
        gradients: float32 (STEPS, ROWS, COLUMNS). They do not depend on the weights, so that a
            difference cannot grow by itself from step to step.
    """

    weights: Matrix
    gradients: Matrix


def trainings() -> dict[str, Training]:
    """All trainings by name.

    - `iid`: weights and gradients are independent and standard normal. Any run of rows looks like
      the whole matrix, so statistics of a piece are nearly those of the whole.
    - `unequal_weights`: the first half of the rows of the weights times 10.
    - `unequal_both`: also row i of every gradient times 1 + i/64, from 1 to 5.
    """
    # The old generator: numpy promises its numbers for all versions, those of the new one not.
    random = np.random.RandomState(SEED)
    weights = random.randn(ROWS, COLUMNS).astype(np.float32)
    gradients = random.randn(STEPS, ROWS, COLUMNS).astype(np.float32)

    unequal_weights = weights.copy()
    unequal_weights[: ROWS // 2] *= 10
    row_scales = (1 + np.arange(ROWS, dtype=np.float32) / 64)[:, np.newaxis]
    return {
        "iid": Training(weights=weights, gradients=gradients),
        "unequal_weights": Training(weights=unequal_weights, gradients=gradients),
        "unequal_both": Training(weights=unequal_weights, gradients=gradients * row_scales),
    }


def save_trainings(path: Path, by_name: Mapping[str, Training]) -> None:
    """Writes trainings for `load_trainings`."""
    arrays = {}
    for name, training in by_name.items():
        arrays[f"{name}.weights"] = training.weights
        arrays[f"{name}.gradients"] = training.gradients
    np.savez(path, **arrays)


def load_trainings(path: Path) -> dict[str, Training]:
    """Reads what `save_trainings` wrote, in its order."""
    with np.load(path) as arrays:
        names = [key.removesuffix(".weights") for key in arrays.files if key.endswith(".weights")]
        return {
            name: Training(weights=arrays[f"{name}.weights"], gradients=arrays[f"{name}.gradients"])
            for name in names
        }


def save_weights(path: Path, by_name: Mapping[str, Matrix]) -> None:
    """Writes the weights after the last step, by name of the training."""
    np.savez(path, **by_name)


def load_weights(path: Path) -> dict[str, Matrix]:
    """Reads what `save_weights` wrote."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def parser(description: str | None) -> ArgumentParser:
    """The arguments that every system's module takes; a module may add its own."""
    arguments = ArgumentParser(description=description)
    arguments.add_argument("trainings", type=Path, help="file of save_trainings")
    arguments.add_argument("weights", type=Path, help="file to write, for load_weights")
    arguments.add_argument("--servers", type=int, required=True, metavar="N")
    return arguments
