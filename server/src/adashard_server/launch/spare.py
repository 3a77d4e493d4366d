"""A shard process that stands by, so that one that dies is replaced in no time.

A shard spends seconds on imports before it says hello, most of them for torch: more than the
grace that its death is noticed after. The process that stands by has them behind it. It has no id
yet and is no member; it costs its memory, about that of an empty shard.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from adashard_server.launch.processes import ServerProcess

AFTER_S = 4.0
"""Seconds before one is started: what has just begun or come back needs the processor itself."""


class Spare:
    """One process that stands by, and the next when that is taken. Thread-safe.

    Args:
        make: starts a process that waits to be activated.
    """

    def __init__(self, make: Callable[[], ServerProcess]) -> None:
        self._make = make
        self._process: ServerProcess | None = None
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._provide, name="adashard-spare", daemon=True)

    def start(self) -> None:
        """Begins to have one; returns at once."""
        self._thread.start()

    def take(self) -> ServerProcess | None:
        """The process that stands by, which begins to serve now; None if there is none."""
        with self._changed:
            process, self._process = self._process, None
            self._changed.notify_all()
        if process is None:
            return None
        if process.exit_code is not None:
            process.stop()
            return None
        process.activate()
        return process

    def stop(self) -> None:
        """Ends the process that stands by. Idempotent."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        if self._process is not None:
            self._process.stop()

    def _provide(self) -> None:
        with self._changed:
            while not self._stopped:
                if not self._changed.wait_for(lambda: self._stopped, AFTER_S):
                    self._process = self._make()
                self._changed.wait_for(lambda: self._stopped or self._process is None)
