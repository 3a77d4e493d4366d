"""A coordinator process: control plane, registry, REST and page, in one event loop."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from adashard.wire.control import Logged, StepSummary
from adashard.wire.errors import AdashardError
from adashard.wire.messages import Entry
from adashard.wire.version import VERSION
from adashard_server.cluster.coordinator import REPLACED, Coordinator
from adashard_server.cluster.instructions import Announce
from adashard_server.cluster.registry import MemoryRegistry, Registry
from adashard_server.cluster.statistics import Event
from adashard_server.cluster.view import CoordinatorView
from adashard_server.config import MEMORY, CoordinatorSettings
from adashard_server.http.app import create_app
from adashard_server.http.server import HttpServer
from adashard_server.rpc.coordinator_server import start_coordinator_server
from adashard_server.rpc.coordinator_service import CoordinatorService
from adashard_server.telemetry.history import History
from adashard_server.telemetry.metrics import Metrics

log = logging.getLogger("adashard.membership")

_STOP_S = 1.0


class CoordinatorProcess:
    """A coordinator with its servers, in the running event loop."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        self._settings = settings
        self.metrics = Metrics(VERSION)
        self._history = History()
        self.address = ""
        self.url = ""

    async def run(self, stop: asyncio.Event, ready: Callable[[CoordinatorProcess], None]) -> str:
        """Serves until `stop` is set or another coordinator has taken over.

        Args:
            stop: set it to end.
            ready: called once both servers listen; `address` and `url` are known then.

        Returns:
            Why another coordinator has taken over; empty after `stop`.

        Raises:
            PortInUse: an address cannot be listened on.
            CannotReachServer: the registry does not answer.
        """
        settings = self._settings
        registry = await asyncio.to_thread(open_registry, settings.registry)
        coordinator = Coordinator(
            uuid.uuid4().hex,
            await asyncio.to_thread(_entries, registry),
            leases=settings.leases,
            min_shards=settings.min_shards,
            token=settings.token,
            slice_bytes=settings.slice_bytes,
            now=time.monotonic(),
        )
        announcer = _Announcer(registry, self._announced)
        service = CoordinatorService(
            coordinator, registry, time.monotonic, announcer.announce, self._observe
        )
        rpc, port = await start_coordinator_server(service, settings.bind, settings.port)
        self.address = f"{settings.host}:{port}"
        view = CoordinatorView(coordinator, registry.name, self.address, time.monotonic)
        self._view = view
        announcer.view = view
        http = HttpServer(
            create_app(view, self._history, self.metrics),
            host=settings.bind,
            port=settings.http_port,
        )
        tasks = [asyncio.create_task(service.run()), asyncio.create_task(announcer.run())]
        try:
            self.url = f"http://{settings.host}:{await http.start()}"
            ready(self)
            stopping = asyncio.ensure_future(stop.wait())
            ends: list[asyncio.Future[Any]] = [stopping, service.ended]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            return service.ended.result() if service.ended.done() else ""
        finally:
            for task in tasks:
                task.cancel()
            await http.stop()
            service.hang_up()
            await rpc.stop(_STOP_S)
            await asyncio.to_thread(registry.close)

    def _announced(self, event: Announce) -> None:
        if event.name == REPLACED:
            self._history.forget(event.job)
            self.metrics.forget(event.job)

    def _observe(self, member: str, telemetry: StepSummary | Logged) -> None:
        if isinstance(telemetry, Logged):
            self._history.log(telemetry)
            return
        shards = self._view.holder_count(telemetry.job)
        if not shards:
            return
        point = self._history.add(member, telemetry, shard_count=shards, now_s=time.time())
        if point is not None:
            self.metrics.observe(telemetry.job, point)


class _Announcer:
    """Writes events to the log and the registry, in order, and remembers them for the page."""

    def __init__(self, registry: Registry, announced: Callable[[Announce], None]) -> None:
        self._registry, self._announced = registry, announced
        self._queue: asyncio.Queue[Announce] = asyncio.Queue()
        self.view: CoordinatorView | None = None

    def announce(self, event: Announce) -> None:
        """Takes an event; never blocks."""
        level = logging.ERROR if event.name == "lost" else logging.INFO
        log.log(level, "%s", event.text, extra={"job": event.job, **event.facts})
        self._announced(event)
        self._queue.put_nowait(event)

    async def run(self) -> None:
        """Writes events until cancelled."""
        for stored in await asyncio.to_thread(self._registry.events):
            self._remember(stored)
        while True:
            event = await self._queue.get()
            now = time.time()
            try:
                sequence = await asyncio.to_thread(
                    self._registry.append_event,
                    event.job,
                    event.name,
                    event.text,
                    event.facts,
                    now,
                )
            except AdashardError as error:
                log.warning("an event could not be written: %s", error.message)
                continue
            self._remember(
                Event(
                    sequence=sequence,
                    time_s=now,
                    job=event.job,
                    name=event.name,
                    text=event.text,
                    facts=event.facts,
                )
            )

    def _remember(self, event: Event) -> None:
        if self.view is not None:
            self.view.remember(event)


def open_registry(url: str) -> Registry:
    """The registry at `url`; "memory" for one that ends with the process.

    Raises:
        CannotReachServer: nobody answers there.
    """
    if url == MEMORY:
        return MemoryRegistry()
    from adashard_server.cluster.redis_registry import RedisRegistry

    return RedisRegistry(url)


def _entries(registry: Registry) -> list[Entry]:
    return [entry for job in registry.jobs() if (entry := registry.read(job)) is not None]
