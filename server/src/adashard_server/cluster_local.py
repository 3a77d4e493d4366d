"""A cluster on this machine: for `adashard up`, notebooks and tests.

Processes by default: one coordinator, N shards, on free ports, so that two clusters are never in
each other's way. One that dies is brought back. They end with the process that started them,
however that ends: each holds a pipe from it and ends when the pipe does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from adashard.wire.errors import AdashardError, Internal
from adashard.wire.placement import DEFAULT_SLICE_BYTES
from adashard_server.cluster.checkpoints import CheckpointSettings
from adashard_server.cluster.leases import LeaseSettings
from adashard_server.config import MEMORY, CoordinatorSettings
from adashard_server.launch.keeper import Keeper
from adashard_server.launch.processes import START_S, ServerProcess
from adashard_server.launch.spare import Spare

if TYPE_CHECKING:
    from adashard_server.launch.threads import CoordinatorThread, ShardThreads

__all__ = ["LocalCluster", "ServerProcess"]

COORDINATOR = "coordinator"


class LocalCluster:
    """A coordinator and shards on 127.0.0.1, from `start` (or `with`) to `stop`.

    As processes, they are brought back when they die: a shard empty and with a new id, the
    coordinator on the same ports. One more shard process stands by from a few seconds after the
    start on, with its imports done, so that a dead one is replaced at once. A process that ends
    because it was asked to stays away; one that dies again and again is given up (`failure`).
    Threads do not die by themselves; `kill_shard` and `restart_shard` do both by hand.

    Args:
        shards: how many.
        slice_bytes: default of the jobs' slices; None for adashard's.
        in_process: run them as threads of this process instead of processes.
        registry: "memory", or the URL of a Redis server.
        port: of the control plane; 0 for a free one.
        http_port: of REST and the page; 0 for a free one.
        quiet: keep the processes' logs to their errors.
        leases: times of membership; None for the defaults.
        restart: whether processes that die are brought back.
        spare: whether a shard process stands by; only with `restart`.
        checkpoint_dir: directory of checkpoints; empty for none.
        checkpoints: when they are cut, and which are kept; None for the defaults.
        resume: "latest" for jobs to begin from their newest checkpoint, or the folder of one.
        environment: variables for the first start of a process, by its name: "coordinator",
            "shard-0" and so on. One that is brought back does not get them.
    """

    def __init__(
        self,
        shards: int = 1,
        *,
        slice_bytes: int | None = None,
        in_process: bool = False,
        registry: str = MEMORY,
        port: int = 0,
        http_port: int = 0,
        quiet: bool = True,
        leases: LeaseSettings | None = None,
        restart: bool = True,
        spare: bool = True,
        checkpoint_dir: str = "",
        checkpoints: CheckpointSettings | None = None,
        resume: str = "",
        environment: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.shard_count = shards
        self.slice_bytes = DEFAULT_SLICE_BYTES if slice_bytes is None else slice_bytes
        self.address = ""
        self.url = ""
        self.failure: AdashardError | None = None
        self._in_process = in_process
        self._registry, self._port, self._http_port = registry, port, http_port
        self._quiet, self._restart = quiet, restart
        self._leases = leases
        self._checkpoint_dir, self._resume = checkpoint_dir, resume
        self._checkpoints = checkpoints or CheckpointSettings()
        self._environment = environment or {}
        self._stack = ExitStack()
        self._keepers: dict[str, Keeper] = {}
        self._spare = Spare(self._standby) if spare and restart and not in_process else None
        self._coordinator: CoordinatorThread | None = None
        self._shards: ShardThreads | None = None

    @property
    def processes(self) -> dict[str, ServerProcess]:
        """Those that run now, by name; none where they are threads."""
        return {name: keeper.process for name, keeper in self._keepers.items()}

    def start(self) -> Self:
        """Starts everything; returns when all shards have joined.

        Raises:
            AdashardError: what kept a process from starting; the others are ended.
        """
        try:
            if self._in_process:
                self._start_threads()
            else:
                self._start_processes()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends everything at once; rounds under way are finished first. Idempotent."""
        for keeper in self._keepers.values():
            keeper.forgo()
        self._stack.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # --- deaths, for tests and for showing ------------------------------------------------------

    def kill_shard(self, index: int) -> None:
        """Ends a shard as a crash would, by SIGKILL; returns when it is dead."""
        if self._shards is not None:
            self._shards.kill(index)
        else:
            self._keepers[_shard(index)].process.kill()

    def kill_coordinator(self) -> None:
        """Ends the coordinator as a crash would, by SIGKILL; returns when it is dead."""
        if self._coordinator is not None:
            self._coordinator.stop()
        else:
            self._keepers[COORDINATOR].process.kill()

    def restart_shard(self, index: int) -> None:
        """Starts a shard that is dead again, where nobody else does; returns when it serves.

        Raises:
            AdashardError: what kept it from starting.
        """
        if self._shards is not None:
            self._shards.start(index)
        else:
            self._keepers[_shard(index)].restart()

    def restart_coordinator(self) -> None:
        """Starts a coordinator that is dead again, where nobody else does, on the same ports.

        Raises:
            AdashardError: what kept it from starting.
        """
        if self._coordinator is not None:
            self._start_coordinator_thread()
        else:
            self._keepers[COORDINATOR].restart()

    def wait_restarted(self, name: str, times: int = 1, timeout_s: float = START_S) -> None:
        """Waits until a process has come back; it serves then.

        Args:
            name: "coordinator", "shard-0" and so on.
            times: how often it has, since the start of the cluster.
            timeout_s: seconds to wait for that.

        Raises:
            Internal: it has not.
        """
        if not self._keepers[name].wait_restarted(times, timeout_s):
            raise Internal(f"{name} has not come back {times} times in {timeout_s:g} s")

    # --- as processes ---------------------------------------------------------------------------

    def _start_processes(self) -> None:
        coordinator = self._keep(COORDINATOR, self._serve_coordinator)
        self._wait_coordinator(coordinator)
        shards = [self._keep(_shard(index), self._serve_shard) for index in range(self.shard_count)]
        for shard in shards:
            shard.process.wait_ready()
        for keeper in self._keepers.values():
            keeper.watch()
        if self._spare is not None:
            self._spare.start()
            self._stack.callback(self._spare.stop)

    def _keep(self, name: str, make: Callable[[str, bool], ServerProcess]) -> Keeper:
        keeper = Keeper(name, partial(make, name), restart=self._restart, lost=self._lost)
        self._stack.callback(keeper.stop)
        self._keepers[name] = keeper
        return keeper

    def _wait_coordinator(self, coordinator: Keeper) -> None:
        """Learns where it serves, which is where the next one serves too."""
        coordinator.process.wait_ready()
        said = coordinator.process.said
        self.address, self.url = said["address"], said["url"]
        self._port, self._http_port = _port(self.address), _port(self.url)

    def _serve_coordinator(self, name: str, first: bool) -> ServerProcess:
        options = {
            "port": self._port,
            "http_port": self._http_port,
            "registry": self._registry,
            "min_shards": self.shard_count,
            "slice_bytes": self.slice_bytes,
            **(asdict(self._leases) if self._leases else {}),  # else from the environment
            "checkpoint_dir": self._checkpoint_dir,
            "checkpoint_every": self._checkpoints.every_steps,
            "keep_last": self._checkpoints.keep_last,
            "keep_best": self._checkpoints.keep_best,
            "resume": self._resume,
        }
        return self._process(COORDINATOR, options, name, first)

    def _serve_shard(self, name: str, first: bool) -> ServerProcess:
        spare = self._spare.take() if self._spare is not None and not first else None
        return spare or self._process("shard", self._shard_options(), name, first)

    def _standby(self) -> ServerProcess:
        return ServerProcess("shard", {**self._shard_options(), "standby": True}, quiet=self._quiet)

    def _shard_options(self) -> dict[str, object]:
        return {"coordinator": self.address, "port": 0}

    def _process(
        self, role: str, options: Mapping[str, object], name: str, first: bool
    ) -> ServerProcess:
        environment = self._environment.get(name) if first else None
        return ServerProcess(role, options, quiet=self._quiet, environment=environment)

    def _lost(self, name: str, error: AdashardError, asked: bool) -> None:
        """A process stays away: the cluster goes on without a shard that was asked to end."""
        if self.failure is None and (name == COORDINATOR or not asked):
            self.failure = error

    # --- as threads -----------------------------------------------------------------------------

    def _start_threads(self) -> None:
        from adashard_server.launch.threads import ShardThreads  # not without torch

        self._start_coordinator_thread()
        self._shards = ShardThreads(self.address)
        self._stack.callback(self._shards.stop)
        for index in range(self.shard_count):
            self._shards.start(index)

    def _start_coordinator_thread(self) -> None:
        from adashard_server.launch.threads import CoordinatorThread

        settings = CoordinatorSettings(
            port=self._port,
            http_port=self._http_port,
            registry=self._registry,
            min_shards=self.shard_count,
            slice_bytes=self.slice_bytes,
            leases=self._leases or LeaseSettings(),
            checkpoint_dir=self._checkpoint_dir,
            checkpoints=self._checkpoints,
            resume=self._resume,
        )
        self._coordinator = CoordinatorThread(settings)
        self._stack.callback(self._coordinator.stop)
        self.address, self.url = self._coordinator.start()
        self._port, self._http_port = _port(self.address), _port(self.url)


def _shard(index: int) -> str:
    return f"shard-{index}"


def _port(address: str) -> int:
    """The port of host:port, with or without a scheme before it."""
    return int(address.rpartition(":")[2])
