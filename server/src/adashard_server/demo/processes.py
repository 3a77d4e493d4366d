"""The demo's workers as processes: started together, heard together, and gone together.

One thread hears all of them. However the `with` block is left, no process of it outlives it.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from adashard_server.demo.progress import Progress, from_line

TICK_S = 0.25
SILENCE_MAX_S = 120.0
END_S = 30.0
STOP_S = 3.0
LAST_LINES = 12
_READ_BYTES = 65536


class WorkerFailed(Exception):
    """A worker ended before its work was done, or did not say a word for too long.

    Attributes:
        index: the worker's number.
        reason: what became of it.
        last_lines: the end of what it wrote on stderr.
    """

    def __init__(self, index: int, reason: str, last_lines: Sequence[str]) -> None:
        self.index = index
        self.reason = reason
        self.last_lines = tuple(last_lines)
        super().__init__(f"worker {index} {reason}")


class Worker:
    """One process, with a pipe for its progress and a file for all else that it writes."""

    def __init__(self, index: int, command: Sequence[str]) -> None:
        self.index = index
        self.heard_s = time.monotonic()
        self._killed = False
        self._rest = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the demo, which then ends its workers
        )
        assert self._process.stdout is not None
        self.output = self._process.stdout
        self.pid = self._process.pid

    def read(self) -> list[Progress] | None:
        """What the worker has told since the last call; None at its end; blocks for a byte."""
        data = os.read(self.output.fileno(), _READ_BYTES)
        if not data:
            return None
        self.heard_s = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [from_line(line) for line in lines]

    def check(self) -> None:
        """Waits for the end of a worker that has said its last word; any will do if it was killed.

        Raises:
            WorkerFailed: the exit code is not 0, or there is none after `END_S`.
        """
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            raise self._failed(f"had no more to say and did not end in {END_S:.0f} s") from None
        if code != 0 and not self._killed:
            raise self._failed(
                f"exited with code {code}" if code > 0 else f"was ended by signal {-code}"
            )

    def check_silence(self, now_s: float) -> None:
        """Raises WorkerFailed for one that has not said a word for too long."""
        if now_s - self.heard_s > SILENCE_MAX_S:
            raise self._failed(f"did not say a word for {SILENCE_MAX_S:.0f} s")

    def kill(self) -> None:
        """Ends it as a crash would; that counts as a good end."""
        self._killed = True
        self._process.kill()

    def terminate(self) -> None:
        """Asks it to end; without effect if it has."""
        self._process.terminate()

    def stop(self) -> None:
        """Waits for its end, forces it after `STOP_S`, and closes what belongs to it."""
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.output.close()
        self._errors.close()

    def _failed(self, reason: str) -> WorkerFailed:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        return WorkerFailed(self.index, reason, lines[-LAST_LINES:])


class Crew:
    """All workers of a demo.

    Args:
        commands: the command line of each.

    Attributes:
        workers: those that were started, in order of their numbers.
    """

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        self._commands = commands
        self.workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        try:
            for index, command in enumerate(self._commands):
                worker = Worker(index, command)
                self.workers.append(worker)
                self._selector.register(worker.output, selectors.EVENT_READ, worker)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def listen(self) -> Iterator[tuple[int, Progress] | None]:
        """What workers tell, until all have ended well; None about every `TICK_S` of silence.

        Yields:
            Number of the worker, and what it told.

        Raises:
            WorkerFailed: one ended before its time, or is silent for too long.
        """
        while self._selector.get_map():
            heard = self._selector.select(TICK_S)
            for key, _ in heard:
                yield from self._hear(key.data)
            if not heard:
                yield None
            self._check_silence()

    def _hear(self, worker: Worker) -> Iterator[tuple[int, Progress]]:
        told = worker.read()
        if told is None:
            self._selector.unregister(worker.output)
            worker.check()
        for progress in told or ():
            yield worker.index, progress

    def _check_silence(self) -> None:
        now_s = time.monotonic()
        for key in self._selector.get_map().values():
            key.data.check_silence(now_s)

    def _stop(self) -> None:
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.stop()
        self._selector.close()


def worker_command(arguments: Sequence[str]) -> list[str]:
    """The command line of a worker in this Python."""
    return [sys.executable, "-m", "adashard_server.demo.worker", *arguments]
