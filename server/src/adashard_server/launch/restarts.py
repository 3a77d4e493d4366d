"""Whether a process that has ended is started again, and when. Pure; the clock is passed in."""

from __future__ import annotations

from dataclasses import dataclass

from adashard.wire.errors import (
    AdashardError,
    CannotReachServer,
    InvalidSettings,
    Unauthenticated,
    VersionSkew,
)

TAKEN_OVER = 3
"""Exit code of a coordinator that another one has replaced."""

STEADY_S = 10.0
DEATHS_MAX = 5
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 5.0
_HOPELESS = (Unauthenticated, VersionSkew, InvalidSettings)


@dataclass(frozen=True, slots=True)
class Again:
    """Start it again, after `wait_s` seconds."""

    wait_s: float


@dataclass(frozen=True, slots=True)
class Leave:
    """It has ended as it was asked to."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Starting it again would not help; why, for people."""

    why: str


Decision = Again | Leave | GiveUp


class Restarts:
    """The deaths of one process, whatever its incarnation.

    The first death is made good at once. One that comes soon after a start is followed by a wait,
    twice as long each time; after `DEATHS_MAX` of those in a row there is something wrong that
    starting does not cure. A process that misses another one, such as a coordinator without its
    Redis, is started until that is there.

    Args:
        name: of the process, for people.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._began = 0.0
        self._deaths = 0  # soon after a start, in a row

    def began(self, now: float) -> None:
        """It has been started."""
        self._began = now

    def ended(self, code: int, error: AdashardError | None, now: float) -> Decision:
        """It has ended.

        Args:
            code: its exit code; the negative number of a signal.
            error: what it said it ended with; None if it could not say.
            now: seconds.
        """
        if code == 0:
            return Leave()
        how = str(error) if error else f"exit code {code}" if code > 0 else f"signal {-code}"
        if code == TAKEN_OVER or isinstance(error, _HOPELESS):
            return GiveUp(f"{self._name} cannot go on: {how}")
        self._deaths = 0 if now - self._began >= STEADY_S else self._deaths + 1
        if self._deaths >= DEATHS_MAX and not isinstance(error, CannotReachServer):
            return GiveUp(
                f"{self._name} has died {self._deaths} times in a row, each time less than "
                f"{STEADY_S:g} s after its start: {how}"
            )
        return Again(_wait_s(self._deaths))


def _wait_s(deaths: int) -> float:
    """How long to wait after so many quick deaths."""
    if deaths <= 1:
        return 0.0
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(deaths - 2, 30))
