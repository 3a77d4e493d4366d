"""The event streams that are open: how many there may be, how fast they tick, and how they end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from adashard.wire.errors import Overloaded


class Streams:
    """Counts open streams and wakes them.

    Args:
        epoch: names this start of the coordinator; numbers of events begin anew with each.
        streams_max: open at the same time; further ones are refused with 429.
        interval_s: seconds between two looks at what has changed.
    """

    def __init__(self, epoch: str, *, streams_max: int = 64, interval_s: float = 0.25) -> None:
        self.epoch = epoch
        self._streams_max = streams_max
        self._interval_s = interval_s
        self._open = 0
        self._closing = asyncio.Event()

    @property
    def open_count(self) -> int:
        """Streams that are open now."""
        return self._open

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Holds one of the `streams_max` places while a stream is open.

        Raises:
            Overloaded: all places are taken.
        """
        if self._open >= self._streams_max:
            raise Overloaded(
                f"{self._open} event streams are open, the most at a time.",
                remedy="Close pages that nobody looks at, or read the lists instead.",
                streams_max=self._streams_max,
            )
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def tick(self) -> bool:
        """Wait until the next look; False if the server goes away, at once."""
        try:
            async with asyncio.timeout(self._interval_s):
                await self._closing.wait()
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        """End all streams now, and those that come later after their first look; idempotent."""
        self._closing.set()
