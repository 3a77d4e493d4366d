"""A real Redis for the tests of this room."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

START_ATTEMPTS = 5


class RedisServer:
    """A `redis-server` process on a port of its own, which keeps its data only if it is durable."""

    def __init__(self, folder: Path, port: int, *, durable: bool = False) -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self._folder, self._durable = folder, durable
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> bool:
        """Start it and wait until it accepts connections; false if its port was taken."""
        settings = {"--bind": "127.0.0.1", "--port": str(self.port), "--dir": str(self._folder)}
        if self._durable:
            settings |= {"--appendonly": "yes", "--appendfsync": "always"}
        self._process = subprocess.Popen(
            ["redis-server", *(word for pair in settings.items() for word in pair), "--save", ""],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        ready = any("Ready to accept connections" in line for line in self._process.stdout)
        if not ready:
            self.stop()
        return ready

    def pause(self) -> None:
        """Have it do nothing, and keep its connections."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Have it go on, with what was sent to it meanwhile."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it as `kill -9` does."""
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None


def start_redis(folder: Path, *, durable: bool = False) -> RedisServer:
    """A server that runs. Somebody may take the free port before it does, so it tries again."""
    for _ in range(START_ATTEMPTS):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        server = RedisServer(folder, port, durable=durable)
        if server.start():
            return server
    raise RuntimeError(f"redis-server did not start on any of {START_ATTEMPTS} ports")


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for all tests that leave it running; each uses a prefix of its own."""
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test may end."""
    server = start_redis(tmp_path)
    yield server
    server.stop()
