"""What a worker of the demo tells the process that started it: one line of JSON each."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Began:
    """A worker has read its text and built its model.

    Attributes:
        parameter_count: numbers in the model.
        training_bytes: text that batches are drawn from.
        training_files: files in it.
        held_out_files: files that no batch is drawn from.
    """

    parameter_count: int
    training_bytes: int
    training_files: int
    held_out_files: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The held-out text was measured with the weights after `step`; 0 is before training.

    Attributes:
        step: steps that these weights have taken.
        bits_per_byte: mean over the bytes that were predicted.
        predicted_bytes: how many these are.
        weights: the SHA-256 of these weights, in hexadecimal digits.
    """

    step: int
    bits_per_byte: float
    predicted_bytes: int
    weights: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """A worker holds the weights after `step`.

    Attributes:
        step: counted from 1.
        loss: of this worker's batch, before the step; nats per byte.
        elapsed_s: seconds since the loop began.
    """

    step: int
    loss: float
    elapsed_s: float


Progress = Began | Evaluated | Stepped

_KINDS = {kind.__name__: kind for kind in (Began, Evaluated, Stepped)}


def to_line(progress: Progress) -> str:
    """The line for this, without its end."""
    return json.dumps({"kind": type(progress).__name__, **asdict(progress)})


def from_line(line: str | bytes) -> Progress:
    """What a line says.

    Raises:
        ValueError: it was not made by `to_line`.
    """
    try:
        fields = json.loads(line)
        return _KINDS[fields.pop("kind")](**fields)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a line of a worker's progress: {line!r}") from error
