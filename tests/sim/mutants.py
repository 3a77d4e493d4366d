"""Mistakes that look right: each is made by switching one rule off (docs/protocol.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

Patch = pytest.MonkeyPatch


class Mutant(NamedTuple):
    """A mistake, and the family of faults in which the simulator is to see it."""

    mistake: Callable[[Patch], None]
    family: str


MUTANTS: list[Mutant] = []


def mutant(family: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Adds a mistake to the list.

    Args:
        family: of faults, in which it shows soonest.
    """

    def added(mistake: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS.append(Mutant(mistake, family))
        return mistake

    return added
