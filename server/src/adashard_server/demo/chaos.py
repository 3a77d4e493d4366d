"""Which processes of a demo are killed, and when: `adashard demo --chaos`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import StrEnum


class Victim(StrEnum):
    """A kind of process that dies; of each, the one with the highest number."""

    SHARD = "shard"
    WORKER = "worker"


class Chaos:
    """Says whose time has come.

    The deaths are spread evenly over the training: one comes in its middle, two at its thirds.

    Args:
        victims: in the order of their deaths.
        steps: that the training takes.
    """

    def __init__(self, victims: Sequence[Victim], steps: int) -> None:
        count = len(victims) + 1
        self._deaths = deque(
            (max(1, steps * number // count), victim)
            for number, victim in enumerate(victims, start=1)
        )

    def due(self, step: int) -> list[Victim]:
        """Those that are to be killed now that `step` is taken; each is named once."""
        due = []
        while self._deaths and self._deaths[0][0] <= step:
            due.append(self._deaths.popleft()[1])
        return due
