"""The whole demo: a cluster, workers, what is seen of them, and an end that leaves nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.filesize import decimal

from adashard.wire.errors import AdashardError
from adashard_server.cluster_local import LocalCluster
from adashard_server.demo.chaos import Chaos, Victim
from adashard_server.demo.events import EventsReader
from adashard_server.demo.figures import FiguresReader
from adashard_server.demo.processes import Crew, WorkerFailed, worker_command
from adashard_server.demo.progress import Began, Evaluated, Progress
from adashard_server.demo.report import Summary, failure, live_line, table
from adashard_server.demo.story import Story
from adashard_server.demo.worker import JOB, Task

DEFAULT_STEPS = 600
DEFAULT_WORKERS = 2
DEFAULT_SHARDS = 2
FAILED = 1
_SIGNALLED = 128  # plus the signal's number, as shells count


def run_demo(
    *,
    steps: int = DEFAULT_STEPS,
    workers: int = DEFAULT_WORKERS,
    shards: int = DEFAULT_SHARDS,
    seed: int = 0,
    victims: Sequence[Victim] = (),
) -> int:
    """Trains a small Transformer through a cluster on this machine, and shows it on stdout.

    Call it from the main thread: it listens for SIGINT and SIGTERM. When it returns, no process
    that it started is left.

    Args:
        steps: of the job, at least 1.
        workers: processes that train, at least 1; each has a core to itself, if there is one.
        shards: processes that hold weights and state, at least 1.
        seed: of the initial weights and of the batches.
        victims: what is killed while it trains, in this order; for a worker, there must be others.

    Returns:
        The exit code: 0, 1 if something failed, 128 plus the number of a signal.
    """
    for name, number in {"steps": steps, "workers": workers, "shards": shards}.items():
        if number < 1:
            raise ValueError(f"{name}={number}: at least 1")
    if victims.count(Victim.WORKER) >= workers:
        raise ValueError(f"workers={workers}: one has to live on")
    console = Console()
    console.print("Starting a coordinator, shards and workers on this machine")
    try:
        with _interruptible(), LocalCluster(shards=shards) as cluster:
            console.print(f"Dashboard  {cluster.url}/  (as long as the demo runs)")
            tasks = [
                Task(address=cluster.address, index=index, workers=workers, steps=steps, seed=seed)
                for index in range(workers)
            ]
            summary = _train(console, cluster, tasks, victims)
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


def _train(
    console: Console, cluster: LocalCluster, tasks: list[Task], victims: Sequence[Victim]
) -> Summary:
    """Runs the workers to their end, or to the one that is meant for them.

    Raises:
        WorkerFailed: one of them did not get there.
    """
    story, chaos = Story(tasks), Chaos(victims, tasks[0].steps)
    commands = [worker_command(task.arguments()) for task in tasks]
    with (
        FiguresReader(cluster.url, JOB) as reader,
        EventsReader(cluster.url, JOB) as events,
        Crew(commands) as crew,
    ):
        with live_line(console, tasks[0].steps) as line:
            for told in crew.listen():
                if told is not None:
                    story.add(*told)
                    _announce(console, *told)
                for victim in chaos.due(story.step):
                    console.print(f"step {story.step}: {_kill(victim, cluster, crew)}")
                for event in events.heard():
                    if victims:
                        console.print(f"step {story.step}: {event}", markup=False)
                status = story.status(reader.newest())
                if status is not None:
                    line.show(status)
        return story.summary(reader.after(tasks[0].steps), cluster.shard_count)


def _kill(victim: Victim, cluster: LocalCluster, crew: Crew) -> str:
    """Kills the one with the highest number, and says so."""
    if victim is Victim.SHARD:
        index = cluster.shard_count - 1
        cluster.kill_shard(index)
    else:
        index = len(crew.workers) - 1
        crew.workers[index].kill()
    return f"{victim} {index} is killed (SIGKILL)"


def _announce(console: Console, index: int, progress: Progress) -> None:
    """Says once what is trained on what, and where it begins."""
    match progress:
        case Began() if index == 0:
            console.print(
                f"A Transformer of {progress.parameter_count:,} parameters reads "
                f"{decimal(progress.training_bytes)} of Python's own source files"
            )
        case Evaluated(step=0):
            console.print(f"Before training: {progress.bits_per_byte:.2f} bits per held-out byte")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turns the first SIGINT or SIGTERM into `Interrupted`; further ones do not disturb the end."""

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise Interrupted(number)

    before = {one: signal.signal(one, interrupt) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
