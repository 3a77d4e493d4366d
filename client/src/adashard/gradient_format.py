"""In which format a worker's gradients travel, from push to push: as asked, or as measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from adashard.encoding import Encoding
from adashard.feedback import Feedback
from adashard.link_speed import (
    BFLOAT16_GBIT_S,
    INT8_GBIT_S,
    LinkMeter,
    Stretch,
    faster,
    format_for,
)
from adashard.wire.spec import DType

log = logging.getLogger("adashard")

AUTO = "auto"
PUSHES_MEASURED = 3
"""Pushes by which "auto" decides. One more before them opens connections, and says nothing."""


class GradientFormat:
    """The format of one worker's pushes. `begin` and `end` belong to the training loop's thread.

    "auto" sends gradients as they are until it has measured a few pushes, decides once, and says
    so in the log. Shards at loopback addresses are not measured: there is no link. What it has
    decided is saved with the worker's state.

    A copy, as `copy.deepcopy` or pickle make it, belongs to another worker: it has no residuals.

    Args:
        asked: "float32", "bfloat16", "float16", "int8", "auto", or None for as they are.
        clock: monotonic seconds.
    """

    def __init__(self, asked: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._asked, self._clock = asked, clock
        self._dtype = None if asked in (None, AUTO) else DType[str(asked).upper()]
        self._decided = asked != AUTO
        self._measured = -1  # pushes; the first is not counted
        self._fastest: Stretch | None = None
        self._feedback = Feedback()

    @property
    def dtype(self) -> DType | None:
        """The format of the next push; None for that of each gradient."""
        return self._dtype

    def begin(self) -> Encoding:
        """How the next push is encoded."""
        meter = None if self._decided else LinkMeter(self._clock)
        feedback = self._feedback if self._dtype is DType.INT8 else None
        return Encoding(self._dtype, feedback=feedback, meter=meter)

    def end(
        self, encoding: Encoding, gradients: Mapping[int, Tensor], *, used: bool, job: str
    ) -> None:
        """A push is over, or was not even begun.

        Args:
            encoding: that of the push.
            gradients: by parameter, as they were pushed.
            used: whether the job took its step with them.
            job: for the log.
        """
        encoding.end(gradients, used=used)
        meter = encoding.meter
        if meter is None or not gradients or self._decided:
            return
        self._measured += 1
        if self._measured:
            self._fastest = faster(self._fastest, meter.fastest())
        if meter.here or self._measured == PUSHES_MEASURED:
            self._dtype, self._decided = None if meter.here else format_for(self._fastest), True
            log.info("job %r: %s", job, self._reason(meter))

    def forget(self) -> None:
        """The worker begins anew in its job, and what it had left to send is not sent."""
        self._feedback.forget()

    # --- what is saved --------------------------------------------------------------------------

    def saved(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """What goes on when the worker's state is loaded; empty where nothing needs to.

        Args:
            parameters: the job's, in registration order.

        Returns:
            "dtype", the format that is in use, and "residuals", by parameter.
        """
        residuals = self._feedback.saved(parameters)
        if not residuals and (self._asked != AUTO or not self._decided):
            return {}
        return {"dtype": self._dtype and self._dtype.name.lower(), "residuals": residuals}

    def load(self, dtype: str | None, residuals: Mapping[int, Tensor]) -> None:
        """Goes on from what was saved; the format counts under "auto" only.

        Args:
            dtype: that of `saved`.
            residuals: those of `saved`; may be kept, are not written to.
        """
        if self._asked == AUTO:
            self._dtype = DType[dtype.upper()] if dtype else None
            self._decided = True
            log.info("gradients travel %s, as before", self._words())
        self._feedback.load(residuals if self._dtype is DType.INT8 else {})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_feedback": Feedback()}

    def _words(self) -> str:
        return f"in {self._dtype.name.lower()}" if self._dtype else "as they are"

    def _reason(self, meter: LinkMeter) -> str:
        """What was chosen, and why."""
        if meter.here:
            return "gradients travel as they are: all shards are on this machine"
        if self._fastest is None:
            return "gradients travel as they are: pushes are too small to measure the link by"
        return (
            f"gradients travel {self._words()}: pushes have gone out at "
            f"{self._fastest.gbit_s:.2g} Gbit/s (int8 pays up to {INT8_GBIT_S:g}, bfloat16 up to "
            f"{BFLOAT16_GBIT_S:g})"
        )
