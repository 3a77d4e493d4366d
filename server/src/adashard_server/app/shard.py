"""A shard process: data plane, reports to its peers, and its control stream."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
import uuid
from dataclasses import replace

import torch

from adashard.transport.attendance import Attendance
from adashard.transport.grpc import GrpcTransport
from adashard.transport.links import Links
from adashard.wire.control import (
    Bye,
    FromCoordinator,
    Happened,
    Hello,
    Notice,
    Planned,
    Renewal,
    ShardHello,
    Snapshotted,
    StepSummary,
    Welcome,
)
from adashard.wire.errors import AdashardError, from_info
from adashard.wire.version import VERSION
from adashard_server.app.storage import SharedStorage
from adashard_server.config import ShardSettings, check_device
from adashard_server.optim.compilation import compile_ahead
from adashard_server.rpc.peer_client import GrpcExchange
from adashard_server.rpc.shard_server import start_shard_server
from adashard_server.shard.exchange import PeerExchange
from adashard_server.shard.shard import Shard

log = logging.getLogger("adashard.membership")

_REPEAT_S = 1.0
_STOP_S = 1.0


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
        self._links = Links(time.monotonic)
        self._exchange = exchange or GrpcExchange(self._links)
        self._storage = SharedStorage(settings.checkpoint_dir)
        self.shard = Shard(
            self.id,
            torch.device(self._device),
            self._exchange,
            time.monotonic,
            self._tell,
            self._storage,
        )
        self._transport = GrpcTransport()
        self._attendance = Attendance(
            self._transport,
            settings.coordinator,
            hello=self._hello,
            renewal=self._renewal,
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
            CheckpointUnreadable: the cluster's directory of checkpoints cannot be seen from here.
            CheckpointUnwritable: nothing may be written there.
            AdashardError: the coordinator cannot be reached, or refuses.
        """
        settings = self._settings
        if self._device == "cpu":
            compile_ahead()
        self._server, port = start_shard_server(self.shard, settings.bind, settings.port)
        self.address = f"{settings.host}:{port}"
        self._ticker.start()
        self._attendance.start()
        with self._changed:
            self._changed.wait_for(lambda: self._welcomed or self.ended is not None)
        if self.ended is not None:
            self.stop(drain_s=0.0)
            raise self.ended

    def stop(self, drain_s: float | None = None) -> None:
        """Drains, leaves, and ends. Rounds under way have `drain_s` seconds to end.

        A shard whose membership has ended is part of no round any more, and drains nothing.
        """
        self.shard.drain()
        longest_s = self._settings.drain_s if drain_s is None else drain_s
        deadline = time.monotonic() + (longest_s if self.ended is None else 0.0)
        while self.shard.busy and time.monotonic() < deadline:
            self._stopping.wait(0.02)
        self._end(_STOP_S)

    def kill(self) -> None:
        """Ends as if the process had died: its streams break, and nothing is said. For tests."""
        self._end(0.0)

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
            entries=self.shard.entries(),
        )

    def _renewal(self) -> Renewal:
        return replace(self.shard.renewal(), broken_links=self._links.broken())

    def _tell(self, message: Planned | StepSummary | Happened | Snapshotted) -> None:
        self._attendance.send(message)

    def _handle(self, message: FromCoordinator) -> None:
        match message:
            case Welcome(lease_s=lease_s):
                self._links.lease_s = lease_s
                self._use_directory(message)
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

    def _use_directory(self, welcome: Welcome) -> None:
        """Looks for the directory of checkpoints; without it this shard must not begin."""
        try:
            self._storage.use(welcome.checkpoint_dir, welcome.checkpoint_mark)
        except AdashardError as error:
            if not self._welcomed:
                self._failed(error)
            log.error("no checkpoint can be cut here: %s", error.message)

    def _end(self, grace_s: float) -> None:
        self._stopping.set()
        self._attendance.close()
        self._server.stop(grace_s).wait()
        self._exchange.close()
        self._transport.close()

    def _failed(self, error: AdashardError) -> None:
        with self._changed:
            self.ended = error
            self._changed.notify_all()

    def _tick(self) -> None:
        while not self._stopping.wait(_REPEAT_S):
            self.shard.repeat()
