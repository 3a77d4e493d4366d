"""How fast a worker's pushes go out, and which format pays at that speed.

A frame counts once the transport asks for the next one: it has then been written, or lies in the
buffers on the way, which hold a few MiB. A shard may keep a worker waiting for others whose turn it
is, so what counts is the fastest stretch of a push, and not all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from adashard.wire.spec import DType

STRETCH_BYTES = 16 << 20
"""What goes out in one measurement: several times what lies in buffers."""

LEAST_BYTES = 1 << 20
"""A push of less says nothing about the link."""

INT8_GBIT_S = 2.0
"""At most so fast is a link on which int8 pays: beyond, making the bytes costs what they save."""

BFLOAT16_GBIT_S = 12.0
"""The same for bfloat16: 10 Gbit/s and a margin."""


class Stretch(NamedTuple):
    """Bytes of frames, and the seconds in which they have gone out."""

    byte_count: int
    seconds: float

    @property
    def gbit_s(self) -> float:
        """Speed in 1e9 bits a second; infinite where no time has passed."""
        return 8e-9 * self.byte_count / self.seconds if self.seconds > 0 else float("inf")


def format_for(stretch: Stretch | None) -> DType | None:
    """The format in which gradients are to travel; None for as they are. Pure.

    Args:
        stretch: the fastest that was seen; None where pushes are too small to say.
    """
    if stretch is None or stretch.gbit_s > BFLOAT16_GBIT_S:
        return None
    return DType.INT8 if stretch.gbit_s <= INT8_GBIT_S else DType.BFLOAT16


class LinkMeter:
    """Measures one push, over all its streams together. Thread-safe.

    Args:
        clock: monotonic seconds.

    Attributes:
        here: whether there is no link: all shards are on this machine.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.here = False
        self._clock = clock
        self._lock = threading.Lock()
        self._since: float | None = None
        self._byte_count = 0
        self._latest = 0.0
        self._fastest: Stretch | None = None

    def began(self, *, here: bool = False) -> None:
        """A stream makes its first frame.

        Args:
            here: whether the shards of the push are on this machine.
        """
        with self._lock:
            self.here = here
            if self._since is None:
                self._since = self._latest = self._clock()

    def accepted(self, byte_count: int) -> None:
        """A frame has gone out."""
        with self._lock:
            assert self._since is not None
            self._byte_count += byte_count
            self._latest = self._clock()
            if self._byte_count >= STRETCH_BYTES:
                self._fastest = faster(self._fastest, self._stretch(self._since))
                self._byte_count, self._since = 0, self._latest

    def fastest(self) -> Stretch | None:
        """The fastest stretch, or the whole of a push that is shorter; None where it is tiny."""
        with self._lock:
            if self._fastest is not None or self._since is None:
                return self._fastest
            return self._stretch(self._since) if self._byte_count >= LEAST_BYTES else None

    def _stretch(self, since: float) -> Stretch:
        return Stretch(self._byte_count, self._latest - since)


def faster(one: Stretch | None, other: Stretch | None) -> Stretch | None:
    """The faster of two, of which either may be missing."""
    both = [stretch for stretch in (one, other) if stretch is not None]
    return max(both, key=lambda stretch: stretch.gbit_s, default=None)
