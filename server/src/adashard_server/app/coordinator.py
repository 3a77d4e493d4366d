"""A coordinator process: control plane, registry, REST and page, in one event loop."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from adashard.wire.control import CHECKPOINT_UNREADABLE, Logged, StepSummary
from adashard.wire.messages import Entry
from adashard.wire.version import VERSION
from adashard_server.app.checkpoints import CheckpointKeeper
from adashard_server.cluster.coordinator import REPLACED, Coordinator
from adashard_server.cluster.cutting import FAILED
from adashard_server.cluster.instructions import Announce
from adashard_server.cluster.registry import EVENTS_KEPT, MemoryRegistry, Registry
from adashard_server.cluster.statistics import Event
from adashard_server.cluster.view import CoordinatorView
from adashard_server.config import MEMORY, CoordinatorSettings
from adashard_server.http.app import create_app
from adashard_server.http.server import HttpServer
from adashard_server.rpc.coordinator_server import start_coordinator_server
from adashard_server.rpc.coordinator_service import CoordinatorService
from adashard_server.rpc.registry_calls import RegistryCalls
from adashard_server.telemetry.history import History
from adashard_server.telemetry.metrics import Metrics
from adashard_server.telemetry.outliers import Outlier, Outliers

log = logging.getLogger("adashard.membership")

_STOP_S = 1.0
_WARNED_OF = (
    "died",
    "degraded",
    "restored",
    "rounded",
    "changed",
    "evicted",
    "not_finite",
    "outlier",
    "registry_gone",
    "registry_lost",
    FAILED,
    CHECKPOINT_UNREADABLE,
)
_LEVELS = {"lost": logging.ERROR, **dict.fromkeys(_WARNED_OF, logging.WARNING)}


class CoordinatorProcess:
    """A coordinator with its servers, in the running event loop."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        self._settings = settings
        self.metrics = Metrics(VERSION)
        self._history = History()
        self._outliers = Outliers(settings.max_update_rms)
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
            AdashardError: the directory of checkpoints, or the one to resume from, is not usable.
        """
        settings = self._settings
        keeper = self._keeper = await asyncio.to_thread(CheckpointKeeper, settings)
        registry = await asyncio.to_thread(open_registry, settings.registry)
        coordinator = Coordinator(
            uuid.uuid4().hex,
            await asyncio.to_thread(_entries, registry),
            leases=settings.leases,
            min_shards=settings.min_shards,
            token=settings.token,
            slice_bytes=settings.slice_bytes,
            alone=settings.registry == MEMORY,
            strikes=settings.strikes,
            checkpoints=keeper.checkpoints,
            now=time.monotonic(),
        )
        announcer = self._announcer = _Announcer(self._announced)
        service = CoordinatorService(
            coordinator,
            registry,
            time.monotonic,
            announcer.announce,
            self._observe,
            keeper.carry_out,
        )
        announcer.registry = service.registry
        rpc, port = await start_coordinator_server(service, settings.bind, settings.port)
        self.address = f"{settings.host}:{port}"
        view = CoordinatorView(coordinator, registry.name, self.address, time.monotonic)
        self._view = view
        announcer.view = view
        http = HttpServer(
            create_app(
                view,
                self._history,
                self.metrics,
                create_checkpoint=partial(keeper.create, coordinator.cuttings),
                token=settings.token,
            ),
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
            await asyncio.to_thread(keeper.close)

    def _announced(self, event: Announce) -> None:
        self._keeper.announced(event)
        if event.name == REPLACED:
            self._history.forget(event.job)
            self._outliers.forget(event.job)
            self.metrics.forget(event.job)

    def _observe(self, member: str, telemetry: StepSummary | Logged) -> None:
        if isinstance(telemetry, Logged):
            self._history.log(telemetry)
            return
        shards = self._view.holder_count(telemetry.job)
        if not shards:
            return
        point = self._history.add(member, telemetry, shard_count=shards, now_s=time.time())
        if point is None:
            return
        self.metrics.observe(telemetry.job, point)
        if (outlier := self._outliers.look(telemetry.job, point)) is not None:
            self._announcer.announce(_told(telemetry.job, outlier))


class _Announcer:
    """Writes events to the log and the registry, in order, and remembers them for the page."""

    def __init__(self, announced: Callable[[Announce], None]) -> None:
        self._announced = announced
        self._queue: asyncio.Queue[tuple[Announce, float]] = asyncio.Queue(EVENTS_KEPT)
        self.registry: RegistryCalls | None = None
        self.view: CoordinatorView | None = None

    def announce(self, event: Announce) -> None:
        """Takes an event; never blocks."""
        level = _LEVELS.get(event.name, logging.INFO)
        log.log(level, "%s", event.text, extra={"job": event.job, **event.facts})
        self._announced(event)
        with suppress(asyncio.QueueFull):  # the registry is away: the log has it
            self._queue.put_nowait((event, time.time()))

    async def run(self) -> None:
        """Writes events until cancelled; they wait while the registry does not answer."""
        assert self.registry is not None
        for stored in await self.registry.ask(lambda registry: registry.events()):
            self._remember(stored)
        while True:
            self._remember(await self.registry.ask(partial(_stored, *await self._queue.get())))

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


def _stored(event: Announce, time_s: float, registry: Registry) -> Event:
    """The event as the registry has it from now on."""
    sequence = registry.append_event(event.job, event.name, event.text, event.facts, time_s)
    return Event(
        sequence=sequence,
        time_s=time_s,
        job=event.job,
        name=event.name,
        text=event.text,
        facts=event.facts,
    )


def _told(job: str, outlier: Outlier) -> Announce:
    rms, bound = f"{outlier.update_rms:.3g}", f"{outlier.bound:.3g}"
    text = f"the update of step {outlier.step} has RMS {rms}, above {bound}: {outlier.why}"
    facts = {"step": str(outlier.step), "update_rms": rms, "bound": bound}
    return Announce(job, "outlier", text, facts)


def _entries(registry: Registry) -> list[Entry]:
    return [entry for job in registry.jobs() if (entry := registry.read(job)) is not None]
