"""Works that are compared are taken in turns, and judged by the median of the rounds' ratios."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Mapping, Sequence

WARM_UP = 2
"""Rounds that are thrown away: memory is touched for the first time."""


def in_turns(works: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each work returns, round by round; who comes first in one round is last in the next.

    Args:
        works: what is measured, by name; each returns seconds.
        rounds: how many count; `WARM_UP` more come before.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(WARM_UP + rounds):
        for name in list(works)[:: 1 - 2 * (turn % 2)]:
            spent = works[name]()
            if turn >= WARM_UP:
                found[name].append(spent)
    return found


def ratio(numbers: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios: what disturbs a round disturbs both."""
    return statistics.median(map(operator.truediv, numbers, others))
