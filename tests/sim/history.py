"""What weights are here: the steps that made them. Two wrong additions never cancel.

A *line* is what all slices of a job have in common at one version: where its weights came from,
and every step since. The *weights* of one slice are a number that follows from the ones before,
the sum of its gradients and the record: other sums, or a record formed of other weights, lead to
another number, as they would lead to other bits.
"""

from __future__ import annotations

from typing import NamedTuple

from adashard.wire.messages import Outcome, Record


class Violation(AssertionError):
    """A promise of the protocol was broken."""


class Step(NamedTuple):
    """One step as all slices of a job have taken it."""

    step: int
    workers: tuple[str, ...]
    outcome: Outcome


class Line:
    """One version of a job's weights; two are the same where they are one object."""

    __slots__ = ("before", "lineage", "name", "number", "version")

    def __init__(
        self, name: str, number: int, lineage: int, version: int, before: Line | None
    ) -> None:
        self.name, self.number = name, number
        self.lineage, self.version, self.before = lineage, version, before

    def __repr__(self) -> str:
        return self.name


class Weights(NamedTuple):
    """Those of one slice, with its optimizer state."""

    line: Line
    value: int

    @property
    def version(self) -> int:
        return self.line.version

    def __repr__(self) -> str:
        return f"<{self.line} {self.value & 0xFFFF:04x}>"


class Gradient(NamedTuple):
    """What one worker computed for one step; the same for every element of every slice."""

    worker: str
    step: int
    number: int
    line: Line
    value: int
    """Of all weights that it was computed on."""
    present: bytes
    not_finite: tuple[int, ...] = ()
    """Parameters in which there is a NaN."""
    said: bool = False
    """Whether the worker has seen that, and sends nothing but the news."""

    @property
    def poisons(self) -> bool:
        """Whether its step is to be skipped."""
        return bool(self.not_finite)


Sum = tuple[Gradient, ...]
"""One element of a sum: what was added, in order."""


def value_of(gradients: Sum) -> int:
    """A number for a sum of these gradients, in this order."""
    return hash(tuple(gradient.number for gradient in gradients))


def exact(value: int) -> float:
    """A number that stays exact when some thousands of such are added up."""
    return float(value & 0xFFFFFFFF)


def after(weights: Weights, line: Line, total: int, record: Record) -> Weights:
    """What a slice holds once it has taken a step with a sum of gradients.

    The record's sums of its parameter are checked apart, against what all slices held.
    """
    return Weights(line, hash((weights.value, line.version, total, record.norm_factor)))
