"""The whole demo: a cluster, workers, what is seen of them, and an end that leaves nothing behind."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from rich.console import Console

from adashard.wire.errors import AdashardError
from adashard_server.cluster_local import LocalCluster
from adashard_server.demo.figures import Figures, FiguresReader
from adashard_server.demo.processes import Crew, WorkerFailed, worker_command
from adashard_server.demo.progress import Began, Evaluated, Progress, Stepped
from adashard_server.demo.report import Line, Status, Summary, failure, live_line, table
from adashard_server.demo.worker import JOB, Task

STEPS = 600
WORKERS = 2
SHARDS = 2
FAILED = 1
_SIGNALLED = 128  # plus the signal's number, as shells count
_SMOOTHED_STEPS = 20


def run_demo(
    *, steps: int = STEPS, workers: int = WORKERS, shards: int = SHARDS, seed: int = 0
) -> int:
    """Trains a small Transformer through a cluster on this machine, and shows it on stdout.

    Call it from the main thread: it listens for SIGINT and SIGTERM. When it returns, no process
    that it started is left.

    Args:
        steps: of the job, at least 1.
        workers: processes that train, at least 1; each has a core to itself, if there is one.
        shards: processes that hold weights and state, at least 1.
        seed: of the initial weights and of the batches.

    Returns:
        The exit code: 0, 1 if something failed, 128 plus the number of a signal.
    """
    for name, number in {"steps": steps, "workers": workers, "shards": shards}.items():
        if number < 1:
            raise ValueError(f"{name}={number}: at least 1")
    console = Console()
    try:
        with _interruptible(), LocalCluster(shards=shards) as cluster:
            console.print(f"Dashboard  {cluster.url}/  (as long as the demo runs)")
            tasks = [
                Task(address=cluster.address, index=index, workers=workers, steps=steps, seed=seed)
                for index in range(workers)
            ]
            summary = _train(console, cluster.url, tasks, shards)
    except WorkerFailed as error:
        console.print(failure(error))
        return FAILED
    except AdashardError as error:
        console.print(str(error), style="red", markup=False)
        return FAILED
    except Interrupted as interruption:
        console.print("Interrupted; all processes of the demo have ended.")
        return _SIGNALLED + interruption.number
    console.print(table(summary))
    return 0


class Interrupted(BaseException):
    """A signal asks the demo to end.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"signal {number}")


class Story:
    """What the workers have told so far."""

    def __init__(self, tasks: list[Task]) -> None:
        self._tasks = tasks
        self._losses: deque[float] = deque(maxlen=_SMOOTHED_STEPS)
        self._began: Began | None = None
        self._evaluated: dict[int, Evaluated] = {}
        self._first: Stepped | None = None
        self._last: Stepped | None = None

    def add(self, index: int, progress: Progress) -> None:
        """Takes in what worker `index` has told."""
        match progress:
            case Began():
                self._began = progress
            case Evaluated(step=step):
                self._evaluated[step] = progress
            case Stepped():
                self._losses.append(progress.loss)
                if index == 0:
                    self._first, self._last = self._first or progress, progress

    def status(self, figures: Figures | None) -> Status | None:
        """Where the training stands; None before the first step."""
        if self._last is None:
            return None
        return Status(
            step=self._last.step,
            steps=self._tasks[0].steps,
            loss=sum(self._losses) / len(self._losses),
            steps_per_s=self._steps_per_s(),
            state_bytes=figures.state_bytes if figures else None,
        )

    def summary(self, figures: Figures, shards: int) -> Summary:
        """What came of it; once all workers have told all."""
        steps = self._tasks[0].steps
        before, after = self._evaluated[0], self._evaluated[steps]
        assert self._began is not None
        return Summary(
            parameter_count=self._began.parameter_count,
            training_bytes=self._began.training_bytes,
            training_files=self._began.training_files,
            workers=len(self._tasks),
            shards=shards,
            steps=steps,
            bits_before=before.bits_per_byte,
            bits_after=after.bits_per_byte,
            predicted_bytes=after.predicted_bytes,
            held_out_files=self._began.held_out_files,
            state_bytes=figures.state_bytes,
            adam_bytes=figures.adam_bytes,
            steps_per_s=self._steps_per_s(),
            pushed_bytes=figures.pushed_bytes,
            pulled_bytes=figures.pulled_bytes,
        )

    def _steps_per_s(self) -> float | None:
        """Since the first step, which also waited for all workers to come."""
        if self._first is None or self._last is None or self._first is self._last:
            return None
        elapsed_s = self._last.elapsed_s - self._first.elapsed_s
        return (self._last.step - self._first.step) / elapsed_s


def _train(console: Console, url: str, tasks: list[Task], shards: int) -> Summary:
    """Runs the workers to their end.

    Raises:
        WorkerFailed: one of them did not get there.
    """
    story = Story(tasks)
    commands = [worker_command(task.arguments()) for task in tasks]
    with FiguresReader(url, JOB) as reader, Crew(commands) as crew:
        with live_line(console, tasks[0].steps) as line:
            for told in crew.listen():
                if told is not None:
                    story.add(*told)
                    _announce(console, told[1])
                _show(line, story.status(reader.newest()))
        return story.summary(reader.after(tasks[0].steps), shards)
