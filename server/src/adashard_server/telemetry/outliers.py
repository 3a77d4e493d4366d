"""Steps whose update is far larger than those before: told of, and not refused. Pure."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from adashard_server.telemetry.points import StepPoint

WINDOW = 100
"""Steps of the past whose median is the level."""

LEAST = 20
"""Steps that there must have been before there is a level."""

FACTOR = 5.0
"""Times the level that an update may be. Adafactor divides a gradient by the root of a mean of
squares that it is itself part of, so the RMS of update t stays below t**0.4 whatever comes: a
larger factor would be silent through the first hundreds of steps."""


@dataclass(frozen=True, slots=True)
class Outlier:
    """A step that is out of line, and what line that is.

    Attributes:
        step: its number.
        update_rms: root mean square of its update, before clipping and step size.
        bound: that it is above.
        why: where the bound comes from, in words.
    """

    step: int
    update_rms: float
    bound: float
    why: str


class Outliers:
    """Looks at the steps of all jobs; names the first of each run of steps that are out of line.

    Args:
        max_update_rms: the most that an update may have, whatever came before; 0 for no such bound.
    """

    def __init__(self, max_update_rms: float = 0.0) -> None:
        self._max_update_rms = max_update_rms
        self._jobs: dict[str, _Level] = {}

    def look(self, job: str, point: StepPoint) -> Outlier | None:
        """The step, if it is out of line and the one before was not.

        Args:
            job: name of the job.
            point: a complete step; one that was skipped has no update, and is passed over.
        """
        if point.skipped or point.update_rms == 0.0:
            return None
        level = self._jobs.setdefault(job, _Level())
        bound, why = level.bound(self._max_update_rms)
        was_out, level.out = level.out, not point.update_rms <= bound
        level.past.append(point.update_rms)
        if was_out or not level.out:
            return None
        return Outlier(point.step, point.update_rms, bound, why)

    def forget(self, job: str) -> None:
        """Drops what is known of a job; idempotent."""
        self._jobs.pop(job, None)


@dataclass(slots=True)
class _Level:
    """What is usual in one job."""

    past: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    out: bool = False

    def bound(self, most: float) -> tuple[float, str]:
        """What an update may have, and where that comes from; infinity where nothing is known."""
        usual = FACTOR * statistics.median(self.past) if len(self.past) >= LEAST else float("inf")
        if most and most < usual:
            return most, "the setting max_update_rms"
        return usual, f"{FACTOR:g} times the median of the last {len(self.past)} steps"
