"""Keeps one process of a cluster alive."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from adashard.wire.errors import AdashardError, Internal
from adashard_server.launch.processes import ServerProcess
from adashard_server.launch.restarts import Again, GiveUp, Leave, Restarts

log = logging.getLogger("adashard.membership")

Make = Callable[[bool], ServerProcess]


class Keeper:
    """One process, started again when it dies. `stop` ends it and all that would follow.

    Args:
        name: of the process, for people.
        make: starts it; is told whether for the first time.
        restart: whether it is brought back when it dies.
        lost: called once if it stays away, other than by `stop`, with the name, the reason, and
            whether somebody had asked it to end.

    Attributes:
        process: the newest.
        times: how often it has come back, and served.
    """

    def __init__(
        self,
        name: str,
        make: Make,
        *,
        restart: bool,
        lost: Callable[[str, AdashardError, bool], None],
    ) -> None:
        self.name = name
        self.times = 0
        self.process = make(True)
        self._make, self._restart, self._lost = make, restart, lost
        self._restarts = Restarts(name)
        self._restarts.began(time.monotonic())
        self._changed = threading.Condition()
        self._stopped = False
        self._watcher = threading.Thread(target=self._watch, name=f"adashard-{name}", daemon=True)

    def watch(self) -> None:
        """Begins to bring it back; to be called once it serves."""
        if self._restart:
            self._watcher.start()

    def restart(self) -> None:
        """Starts it again, where nobody else does; returns when it serves.

        Raises:
            AdashardError: what kept it from starting.
        """
        if self._begin():
            self.process.wait_ready()
            self._served()

    def wait_restarted(self, times: int, timeout_s: float) -> bool:
        """Waits until it has come back `times` times; whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self.times >= times, timeout_s)

    def forgo(self) -> None:
        """Asks it to end, and nothing is started any more; returns at once. Idempotent."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.process.terminate()

    def stop(self) -> None:
        """Ends it, and what it may be followed by. Idempotent."""
        self.forgo()
        self.process.stop()
        if self._watcher.ident is not None:
            self._watcher.join()

    # --- the watcher's thread -------------------------------------------------------------------

    def _watch(self) -> None:
        end = self.process.wait_end()
        while not self._stopped:
            decision = self._restarts.ended(*end, time.monotonic())
            if not isinstance(decision, Again):
                return self._stays_away(decision)
            log.warning("%s has died (%s): starting it again", self.name, _words(*end))
            self._sleep(decision.wait_s)
            if not self._begin():
                return
            end = self._life()

    def _stays_away(self, decision: Leave | GiveUp) -> None:
        match decision:
            case Leave():
                log.info("%s has ended, as it was asked to", self.name)
                error = Internal(f"{self.name} has ended, as it was asked to")
            case GiveUp(why=why):
                log.error("%s", why)
                error = Internal(why)
        self._lost(self.name, error, isinstance(decision, Leave))

    def _life(self) -> tuple[int, AdashardError | None]:
        """From a start to its end."""
        try:
            self.process.wait_ready()
        except AdashardError as error:
            return self.process.wait(), error
        self._served()
        return self.process.wait_end()

    def _begin(self) -> bool:
        """Starts the next one, unless this keeper has been stopped."""
        with self._changed:
            if not self._stopped:
                self.process = self._make(False)
                self._restarts.began(time.monotonic())
            return not self._stopped

    def _served(self) -> None:
        with self._changed:
            self.times += 1
            self._changed.notify_all()

    def _sleep(self, wait_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, wait_s)


def _words(code: int, error: AdashardError | None) -> str:
    if error is not None:
        return error.message
    return f"exit code {code}" if code >= 0 else f"signal {-code}"
