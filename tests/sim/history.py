"""What weights are here: the list of steps that made them. Two wrong additions never cancel."""

from __future__ import annotations

from typing import NamedTuple

from adashard.wire.messages import Outcome


class Step(NamedTuple):
    """One step as a slice has taken it."""

    step: int
    workers: tuple[str, ...]
    outcome: Outcome


class History(NamedTuple):
    """The weights of any slice: whose initial ones, and every step since."""

    origin: str
    steps: tuple[Step, ...] = ()

    @property
    def version(self) -> int:
        return len(self.steps)

    def then(self, step: Step) -> History:
        return History(self.origin, (*self.steps, step))


class Gradient(NamedTuple):
    """What one worker computed for one step; the same for every slice and element."""

    worker: str
    step: int
    base: History
    present: bytes
    finite: bool


Sum = tuple[Gradient, ...]
"""One element of a sum: what was added, in order."""


class Violation(AssertionError):
    """A promise of the protocol was broken."""
