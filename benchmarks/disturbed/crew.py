"""Trainees as processes: started, told what to do, heard, killed and replaced."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

SCRIPT = Path(__file__).with_name("trainee.py")
START_S = 60.0


class Silent(Exception):
    """A trainee has not said what was waited for, in the time there was."""


class Failed(Exception):
    """A trainee has met an error, and says which."""


class Ended(Failed):
    """A trainee's process has ended."""


class TraineeProcess:
    """One worker process.

    Args:
        environment: of the process, beside this one's.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._child = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,  # a Ctrl-C is for the parent, which ends it
        )
        self._ready = False
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._child.poll() is None

    def wait_ready(self) -> Self:
        """Waits until it takes orders."""
        if not self._ready:
            self.hear(START_S)
            self._ready = True
        return self

    def tell(self, do: str, **order: Any) -> None:
        """Gives an order; without effect on a process that has ended."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._child.stdin.flush()

    def hear(self, timeout_s: float) -> dict[str, Any]:
        """The next that it says.

        Raises:
            Silent: it has said nothing for so long.
            Failed: it has met an error.
            Ended: its process has ended.
        """
        try:
            said = self._said.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            raise Silent(f"worker process {self.pid} says nothing") from None
        if said is None:
            self._said.put(None)  # whoever asks again hears the same
            raise Ended(f"worker process {self.pid} has ended")
        if "error" in said:
            raise Failed(said["error"])
        return said

    def heard(self) -> list[dict[str, Any]]:
        """All that it has said since it was last heard; never waits.

        Raises:
            Failed: it has met an error.
            Ended: its process has ended.
        """
        said = []
        while not self._said.empty():
            said.append(self.hear(0.0))
        return said

    def kill(self) -> None:
        """Ends it as a crash would; returns when it is gone. Idempotent."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # an order that nobody has read
                    pipe.close()

    def _listen(self) -> None:
        assert self._child.stdout is not None
        try:
            for line in self._child.stdout:
                self._said.put(json.loads(line))
        except ValueError:  # killed in the middle of a line, or closed
            pass
        self._said.put(None)


class Crew:
    """So many trainees, of which those that have died are replaced when they are needed.

    Args:
        size: how many.
        environment: of their processes, beside this one's.
    """

    def __init__(self, size: int, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.trainees = [TraineeProcess(environment) for _ in range(size)]

    def complete(self) -> list[TraineeProcess]:
        """All of them, alive and ready."""
        for index, trainee in enumerate(self.trainees):
            if not trainee.alive:
                self.replace(index)
        return [trainee.wait_ready() for trainee in self.trainees]

    def replace(self, index: int) -> TraineeProcess:
        """A new process in the place of one that has ended, or is ended now."""
        self.trainees[index].kill()
        self.trainees[index] = TraineeProcess(self._environment)
        return self.trainees[index]

    def stop(self) -> None:
        """Ends them all."""
        for trainee in self.trainees:
            trainee.kill()
