"""A cluster's members as threads of this process: for tests and notebooks."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress

from adashard.wire.errors import AdashardError, Internal
from adashard_server.app.coordinator import CoordinatorProcess
from adashard_server.app.shard import ShardProcess
from adashard_server.config import CoordinatorSettings, ShardSettings
from adashard_server.launch.processes import START_S, STOP_S
from adashard_server.shard.exchange import MemoryExchange

log = logging.getLogger("adashard.membership")


class CoordinatorThread:
    """A coordinator with an event loop of its own, in a thread of this process."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        self._settings = settings
        self._started = threading.Event()
        self._error: AdashardError | None = None
        self._where = ("", "")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="adashard-coordinator", daemon=True)

    def start(self) -> tuple[str, str]:
        """Address and URL, once it serves.

        Raises:
            AdashardError: what kept it from serving.
        """
        self._thread.start()
        if not self._started.wait(START_S):
            raise Internal("the coordinator did not start")
        if self._error is not None:
            raise self._error
        return self._where

    def stop(self) -> None:
        """Ends it; returns when it is gone. Idempotent."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except AdashardError as error:
            self._error = error
        except Exception as defect:
            log.exception("the coordinator could not be started or has failed")
            self._error = Internal(f"the coordinator could not go on: {defect!r}")
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await CoordinatorProcess(self._settings).run(self._stop, self._ready)

    def _ready(self, process: CoordinatorProcess) -> None:
        self._where = (process.address, process.url)
        self._started.set()


class ShardThreads:
    """Shards that hand each other their reports in memory.

    Args:
        coordinator: host:port of the coordinator.
    """

    def __init__(self, coordinator: str) -> None:
        self._settings = ShardSettings(coordinator=coordinator, device="cpu")
        self._exchange = MemoryExchange()
        self._shards: dict[int, ShardProcess] = {}

    def start(self, index: int) -> None:
        """Starts a shard in this place, empty and with a new id; returns when it has joined.

        Raises:
            AdashardError: what kept it from joining.
        """
        shard = self._shards[index] = ShardProcess(self._settings, self._exchange)
        self._exchange.attach(shard.id, shard.shard.exchange)
        shard.start()

    def kill(self, index: int) -> None:
        """Ends a shard as if its process had died."""
        shard = self._shards.pop(index)
        self._exchange.detach(shard.id)
        shard.kill()

    def stop(self) -> None:
        """Ends all shards; no round is waited for. Idempotent."""
        while self._shards:
            _, shard = self._shards.popitem()
            shard.stop(drain_s=0.0)
