"""Steps that a loop leaves out, which its optimizer is never told of."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

TOLERATED = 1
"""Steps in a row that may be left out; a GradScaler that looks for its scale leaves out one now
and then, and the next attempt is for the same step of the job."""


@dataclass(slots=True)
class Omissions:
    """Counts how often in a row gradients were dropped without a step.

    What a loop that leaves out `step()` still does is to clear its gradients. There is nothing
    more to go by, and nothing is pushed from here: a push writes fresh weights, and a loop may
    clear gradients between its forward and its backward pass.
    """

    in_a_row: int = 0
    _stepped: bool = False

    def stepped(self) -> None:
        """A step was taken, with a gradient or without."""
        self._stepped, self.in_a_row = True, 0

    def dropped(self, job: str) -> None:
        """Gradients are being cleared; warns once when too many steps in a row had none."""
        if self._stepped:
            self._stepped = False
            return
        self.in_a_row += 1
        if self.in_a_row == TOLERATED + 1:
            warnings.warn(
                f"step() was left out {self.in_a_row} times in a row, and the other workers of "
                f"job {job!r} wait for this one. Call skip_step() where you leave out step(), or "
                "use adashard.GradScaler, which does.",
                RuntimeWarning,
                stacklevel=3,  # where the gradients are cleared
            )
