"""Puts the rooms together into processes: the only file that knows every one of them."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import torch

from adashard.transport.attendance import Attendance
from adashard.transport.grpc import GrpcTransport
from adashard.wire.errors import AdashardError, from_info
from adashard.wire.messages import (
    Bye,
    FromCoordinator,
    Hello,
    Logged,
    Notice,
    Planned,
    ShardHello,
    StepSummary,
    Welcome,
)
from adashard.wire.version import VERSION
from adashard_server.cluster.coordinator import REPLACED, Coordinator
from adashard_server.cluster.instructions import Announce
from adashard_server.cluster.registry import MemoryRegistry, Registry
from adashard_server.cluster.statistics import Event
from adashard_server.cluster.view import CoordinatorView
from adashard_server.config import MEMORY, CoordinatorSettings, ShardSettings, check_device
from adashard_server.http.app import create_app
from adashard_server.http.server import HttpServer
from adashard_server.rpc.coordinator_service import CoordinatorService
from adashard_server.rpc.peer_client import GrpcExchange
from adashard_server.rpc.server import coordinator_server, shard_server
from adashard_server.shard.exchange import PeerExchange
from adashard_server.shard.shard import Shard
from adashard_server.telemetry import logs
from adashard_server.telemetry.history import History
from adashard_server.telemetry.metrics import Metrics

log = logging.getLogger("adashard.membership")

_REPEAT_S = 1.0
_STOP_S = 1.0


# --- the coordinator -----------------------------------------------------------------------------


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
            now=time.monotonic(),
        )
        announcer = _Announcer(registry, self._announced)
        service = CoordinatorService(
            coordinator, registry, time.monotonic, announcer.announce, self._observe
        )
        rpc, port = await coordinator_server(service, settings.bind, settings.port)
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
        jobs = {job.name: job for job in self._view.job_statistics()}
        if telemetry.job not in jobs:
            return
        shards = max(1, jobs[telemetry.job].shard_count)
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


def _entries(registry: Registry) -> list[Any]:
    return [entry for job in registry.jobs() if (entry := registry.read(job)) is not None]


# --- a shard -------------------------------------------------------------------------------------


class ShardProcess:
    """A shard with its server and its control stream. `start`, then `stop`; both from one thread.

    Args:
        settings: where it listens and whom it belongs to.
        exchange: how reports reach the other shards; None for gRPC.
    """

    def __init__(self, settings: ShardSettings, exchange: PeerExchange | None = None) -> None:
        self.id = uuid.uuid4().hex
        self.address = ""
        self.ended: AdashardError | None = None
        self._settings = settings
        self._device = check_device(settings.device)
        self._exchange = exchange or GrpcExchange()
        self.shard = Shard(
            self.id, torch.device(self._device), self._exchange, time.monotonic, self._tell
        )
        self._transport = GrpcTransport()
        self._attendance = Attendance(
            self._transport,
            settings.coordinator,
            hello=self._hello,
            renewal=self.shard.renewal,
            handle=self._handle,
            failed=self._failed,
        )
        self._changed = threading.Condition()
        self._welcomed = False
        self._stopping = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="adashard-repeat", daemon=True)

    def start(self) -> None:
        """Listens and joins the cluster; returns when the coordinator has answered.

        Raises:
            PortInUse: the address cannot be listened on.
            AdashardError: the coordinator cannot be reached, or refuses.
        """
        settings = self._settings
        self._server, port = shard_server(self.shard, settings.bind, settings.port)
        self.address = f"{settings.host}:{port}"
        self._ticker.start()
        self._attendance.start()
        with self._changed:
            self._changed.wait_for(lambda: self._welcomed or self.ended is not None)
        if self.ended is not None:
            self.stop(drain_s=0.0)
            raise self.ended

    def stop(self, drain_s: float | None = None) -> None:
        """Drains, leaves, and ends. Rounds under way have `drain_s` seconds to end."""
        self.shard.drain()
        deadline = time.monotonic() + (self._settings.drain_s if drain_s is None else drain_s)
        while self.shard.busy and time.monotonic() < deadline:
            self._stopping.wait(0.02)
        self._stopping.set()
        self._attendance.close()
        self._server.stop(_STOP_S).wait()
        self._exchange.close()
        self._transport.close()

    def wait_ended(self, timeout_s: float) -> bool:
        """Waits until the coordinator has ended this shard's membership; whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self.ended is not None, timeout_s)

    def _hello(self) -> Hello:
        return Hello(
            id=self.id,
            version=VERSION,
            host=platform.node(),
            pid=os.getpid(),
            token=self._settings.token,
            shard=ShardHello(address=self.address, device=self._device),
        )

    def _tell(self, message: Planned | StepSummary) -> None:
        self._attendance.send(message)

    def _handle(self, message: FromCoordinator) -> None:
        match message:
            case Welcome():
                with self._changed:
                    self._welcomed = True
                    self._changed.notify_all()
            case Notice(text=text):
                log.info("%s", text)
            case Bye(job="", error=error):
                self._failed(from_info(error) if error else AdashardError("told to end"))
            case _:
                answer = self.shard.handle(message)
                if answer is not None:
                    self._attendance.send(answer)
                if answer is not None and not isinstance(answer, Planned):
                    self._attendance.renew()

    def _failed(self, error: AdashardError) -> None:
        with self._changed:
            self.ended = error
            self._changed.notify_all()

    def _tick(self) -> None:
        while not self._stopping.wait(_REPEAT_S):
            self.shard.repeat()


def configure_logs(level: str, metrics: Metrics | None = None) -> None:
    """Sends the logs of this process to standard error; `metrics` counts their lines."""
    logs.configure(level, on_record=metrics.count_record if metrics else None)
