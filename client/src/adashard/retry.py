"""Which errors are worth repeating the same call, and how long to wait before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import uniform

from adashard.wire.errors import (
    AdashardError,
    CannotReachServer,
    DamagedFrame,
    Draining,
    Overloaded,
    ShardUnavailable,
)

_REPEATABLE = (ShardUnavailable, CannotReachServer, DamagedFrame, Draining, Overloaded)


def repeatable(error: AdashardError) -> bool:
    """Whether the same call, under the same name, may succeed a little later."""
    return isinstance(error, _REPEATABLE)


@dataclass(slots=True)
class Backoff:
    """Full-jitter exponential back-off with a budget. Not thread-safe.

    Args:
        budget_s: seconds after which `next_s` gives up.
        clock: seconds, monotonic.
        first_s: bound of the first wait.
        longest_s: bound of every wait.
    """

    budget_s: float
    clock: Callable[[], float]
    first_s: float = 0.1
    longest_s: float = 2.0
    attempts: int = 0
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        self._began = self.clock()

    @property
    def spent_s(self) -> float:
        """Seconds since the first attempt."""
        return self.clock() - self._began

    def next_s(self) -> float | None:
        """How long to wait before the next attempt; None when the budget is spent."""
        self.attempts += 1
        if self.spent_s >= self.budget_s:
            return None
        bound = min(self.longest_s, self.first_s * 2.0 ** min(self.attempts - 1, 30))
        return uniform(0.0, bound)
