"""A cluster on this machine: for `adashard up`, notebooks and tests.

Processes by default: one coordinator, N shards, on free ports, so that two clusters are never in
each other's way. They end with the process that started them, however that ends: each holds a
pipe from it and ends when the pipe does.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import IO, Any, Self

from adashard.wire.errors import AdashardError, Internal, from_info
from adashard.wire.messages import ErrorInfo
from adashard.wire.placement import DEFAULT_SLICE_BYTES

START_S = 60.0
STOP_S = 15.0


class LocalCluster:
    """A coordinator and shards on 127.0.0.1, from `start` (or `with`) to `stop`.

    Args:
        shards: how many.
        slice_bytes: default of the jobs' slices; None for adashard's.
        in_process: run them as threads of this process instead of processes.
        registry: "memory", or the URL of a Redis server.
        port: of the control plane; 0 for a free one.
        http_port: of REST and the page; 0 for a free one.
        quiet: keep the processes' logs to their errors.
    """

    def __init__(
        self,
        shards: int = 1,
        *,
        slice_bytes: int | None = None,
        in_process: bool = False,
        registry: str = "memory",
        port: int = 0,
        http_port: int = 0,
        quiet: bool = True,
    ) -> None:
        self.shard_count = shards
        self.slice_bytes = DEFAULT_SLICE_BYTES if slice_bytes is None else slice_bytes
        self.address = ""
        self.url = ""
        self._in_process = in_process
        self._registry, self._port, self._http_port = registry, port, http_port
        self._quiet = quiet
        self._stack = ExitStack()
        self.processes: list[ServerProcess] = []

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
        for process in self.processes:
            process.terminate()
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

    def _start_processes(self) -> None:
        coordinator = self._process(
            "coordinator",
            port=self._port,
            http_port=self._http_port,
            registry=self._registry,
            min_shards=self.shard_count,
            slice_bytes=self.slice_bytes,
        )
        self.address, self.url = coordinator.said["address"], coordinator.said["url"]
        waiting = [
            self._process("shard", coordinator=self.address, port=0, wait=False)
            for _ in range(self.shard_count)
        ]
        for shard in waiting:
            shard.wait_ready()

    def _process(self, role: str, *, wait: bool = True, **options: object) -> ServerProcess:
        process = ServerProcess(role, options, quiet=self._quiet)
        self._stack.callback(process.stop)
        self.processes.append(process)
        if wait:
            process.wait_ready()
        return process

    def _start_threads(self) -> None:
        from adashard_server.app.shard import ShardProcess
        from adashard_server.config import ShardSettings
        from adashard_server.shard.exchange import MemoryExchange

        coordinator = _CoordinatorThread(
            port=self._port,
            http_port=self._http_port,
            registry=self._registry,
            min_shards=self.shard_count,
            slice_bytes=self.slice_bytes,
        )
        self._stack.callback(coordinator.stop)
        self.address, self.url = coordinator.start()
        exchange = MemoryExchange()
        for _ in range(self.shard_count):
            shard = ShardProcess(ShardSettings(coordinator=self.address, device="cpu"), exchange)
            exchange.attach(shard.id, shard.shard.exchange)
            shard.start()
            self._stack.callback(shard.stop, drain_s=0.0)


class ServerProcess:
    """`adashard serve ROLE` as a child process.

    Args:
        role: "coordinator" or "shard".
        options: of the command, by name.
        quiet: keep its log to errors.
    """

    def __init__(self, role: str, options: Mapping[str, object], *, quiet: bool = True) -> None:
        self.role = role
        self.said: Mapping[str, Any] = {}
        arguments = [
            text
            for name, value in options.items()
            for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        level = "ERROR" if quiet else "INFO"
        self._child = subprocess.Popen(
            _command(role, [*arguments, "--log-level", level, "--supervised"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C in the terminal is for the parent, which ends us
        )

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs."""
        return self._child.poll()

    def wait_ready(self) -> None:
        """Waits until it serves; `said` then holds where.

        Raises:
            AdashardError: what kept it from starting.
        """
        line = _first_line(self._child.stdout, START_S)
        said = json.loads(line) if line else {}
        if "error" in said:
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(STOP_S)  # it ends by itself, with an exit code of its own
            self.stop()
            raise from_info(ErrorInfo(**said["error"]))
        if not said:
            code = self._child.poll()
            self.stop()
            raise Internal(f"adashard serve {self.role} did not start (exit code {code})")
        self.said = said

    def terminate(self) -> None:
        """Asks it to drain and end; returns at once."""
        self._child.terminate()

    def kill(self) -> None:
        """Ends it as a crash would; returns when it is gone."""
        self._child.kill()
        self._child.wait()
        self._close_pipes()

    def wait(self, timeout_s: float = STOP_S) -> int:
        """Waits for its end; the exit code."""
        return self._child.wait(timeout_s)

    def stop(self) -> None:
        """Ends it politely, and by force if that does not help. Idempotent."""
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()


def _command(role: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "adashard_server.cli", "serve", role, *arguments]


def _first_line(stream: IO[str] | None, timeout_s: float) -> str:
    """The first line of a pipe, or nothing if it does not come in time."""
    lines: list[str] = []
    assert stream is not None
    reader = threading.Thread(target=lambda: lines.append(stream.readline()), daemon=True)
    reader.start()
    reader.join(timeout_s)
    return lines[0] if lines else ""


class _CoordinatorThread:
    """A coordinator with an event loop of its own, in a thread of this process."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - CoordinatorSettings' fields
        self._settings = settings
        self._started = threading.Event()
        self._error: AdashardError | None = None
        self._where = ("", "")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="adashard-coordinator", daemon=True)

    def start(self) -> tuple[str, str]:
        """Address and URL, once it serves."""
        self._thread.start()
        if not self._started.wait(START_S):
            raise Internal("the coordinator did not start")
        if self._error is not None:
            raise self._error
        return self._where

    def stop(self) -> None:
        """Ends it; returns when it is gone."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except AdashardError as error:
            self._error = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        from adashard_server.app.coordinator import CoordinatorProcess
        from adashard_server.config import CoordinatorSettings

        self._loop = asyncio.get_running_loop()
        process = CoordinatorProcess(CoordinatorSettings(**self._settings))
        await process.run(self._stop, self._ready)

    def _ready(self, process: Any) -> None:  # noqa: ANN401 - app.CoordinatorProcess
        self._where = (process.address, process.url)
        self._started.set()
