"""The processes of a cluster: `adashard serve ROLE`, as children of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from adashard.wire.errors import AdashardError, Internal, from_info
from adashard.wire.messages import ErrorInfo

START_S = 60.0
STOP_S = 15.0
ENDING_S = 1.0  # between a process's last word and its exit code


class ServerProcess:
    """`adashard serve ROLE` as a child process. It ends with this one, however that ends.

    Args:
        role: "coordinator" or "shard".
        options: of the command, by name; True for one that has no value.
        quiet: keep its log to errors.
        environment: variables beside this process's own.
    """

    def __init__(
        self,
        role: str,
        options: Mapping[str, object],
        *,
        quiet: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.role = role
        self.said: Mapping[str, Any] = {}
        level = "ERROR" if quiet else "INFO"
        self._child = subprocess.Popen(
            _command(role, [*_arguments(options), "--log-level", level, "--supervised"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
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

    def activate(self) -> None:
        """Has a process that stands by begin; without effect on one that has ended."""
        assert self._child.stdin is not None
        with suppress(OSError, ValueError):
            self._child.stdin.write("\n")
            self._child.stdin.flush()

    def wait_ready(self) -> None:
        """Waits until it serves; `said` then holds where.

        Raises:
            AdashardError: what kept it from starting.
        """
        said = _read(_first_line(self._child.stdout, START_S))
        if "error" in said:
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(STOP_S)  # it ends by itself, with an exit code of its own
            self.stop()
            raise from_info(ErrorInfo(**said["error"]))
        if not said:
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(ENDING_S)
            code = self._child.poll()
            self.stop()
            raise Internal(f"adashard serve {self.role} did not start (exit code {code})")
        self.said = said

    def wait_end(self) -> tuple[int, AdashardError | None]:
        """Waits for the end of one that served; its exit code, and the error that it told."""
        code = self._child.wait()
        error: AdashardError | None = None
        if code > 0 and self._child.stdout is not None:
            with suppress(ValueError):  # closed by another thread
                said = _read(self._child.stdout.readline())
                error = from_info(ErrorInfo(**said["error"])) if "error" in said else None
        self._close_pipes()
        return code, error

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
                with suppress(OSError):  # what was to be written has nobody who reads it
                    pipe.close()


def _command(role: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "adashard_server.cli", "serve", role, *arguments]


def _arguments(options: Mapping[str, object]) -> list[str]:
    found: list[str] = []
    for name, value in options.items():
        found.append(f"--{name.replace('_', '-')}")
        if value is not True:
            found.append(str(value))
    return found


def _read(line: str) -> dict[str, Any]:
    """What a process says of itself: where it serves, or why it does not."""
    with suppress(ValueError):
        said = json.loads(line)
        if isinstance(said, dict):
            return said
    return {}


def _first_line(stream: IO[str] | None, timeout_s: float) -> str:
    """The first line of a pipe, or nothing if it does not come in time."""
    lines: list[str] = []
    assert stream is not None

    def read() -> None:
        with suppress(ValueError):  # closed by another thread
            lines.append(stream.readline())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout_s)
    return lines[0] if lines else ""
