"""What the terminal shows of a demo: a live line while it trains, and a table at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Protocol, Self

from rich.box import HORIZONTALS
from rich.console import Console, Group
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from adashard_server.demo.processes import WorkerFailed

PLAIN_INTERVAL_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Where the training stands.

    Attributes:
        step: steps taken.
        steps: steps to take.
        loss: nats per byte, smoothed over the newest steps.
        steps_per_s: None before the second step.
        state_bytes: optimizer state on all shards; None until they have told.
    """

    step: int
    steps: int
    loss: float
    steps_per_s: float | None
    state_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What came of it.

    Attributes:
        parameter_count: numbers in the model.
        training_bytes: text that batches were drawn from.
        training_files: files in it.
        workers: processes that trained.
        shards: processes that held weights and state.
        steps: steps taken.
        bits_before: bits per held-out byte with the first weights.
        bits_after: the same with the last.
        predicted_bytes: held-out bytes that this was measured on.
        held_out_files: files that they are from.
        state_bytes: optimizer state on all shards.
        adam_bytes: what Adam would hold for the same model.
        steps_per_s: None for a single step.
        training_s: seconds from the first worker's first batch to its last weights.
        pushed_bytes: gradients that shards received.
        pulled_bytes: weights that shards sent.
        push_count: steps of all workers together.
        longest_s: seconds from one step's end to the next one's, where that was longest.
        weights: SHA-256 of the last weights, in hexadecimal digits.
    """

    parameter_count: int
    training_bytes: int
    training_files: int
    workers: int
    shards: int
    steps: int
    bits_before: float
    bits_after: float
    predicted_bytes: int
    held_out_files: int
    state_bytes: int
    adam_bytes: int
    steps_per_s: float | None
    training_s: float
    pushed_bytes: int
    pulled_bytes: int
    push_count: int
    longest_s: float
    weights: str


class Line(AbstractContextManager["Line"], Protocol):
    """Shows where the training stands, from `with` to its end."""

    def show(self, status: Status) -> None:
        """Shows a newer status; cheap enough for every step."""


def live_line(console: Console, steps: int) -> Line:
    """A bar on a terminal; elsewhere a plain line every few seconds."""
    return Bar(console, steps) if console.is_terminal else PlainLines(console)


class Bar:
    """One line that redraws itself."""

    def __init__(self, console: Console, steps: int) -> None:
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=console,
        )
        self._task = self._progress.add_task("waiting for the workers", total=steps)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, status: Status) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=status.step, description=describe(status))


class PlainLines:
    """For files and pipes: the first status, the last, and one every `PLAIN_INTERVAL_S`.

    Args:
        console: to print on.
        clock: seconds, ascending.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = monotonic) -> None:
        self._console, self._clock = console, clock
        self._due_s = 0.0
        self._shown = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def show(self, status: Status) -> None:
        """Prints a line if the step is a new one, and it is time for a line or the last step."""
        now_s = self._clock()
        if status.step > self._shown and (now_s >= self._due_s or status.step == status.steps):
            self._shown, self._due_s = status.step, now_s + PLAIN_INTERVAL_S
            self._console.print(f"step {status.step}/{status.steps}  {describe(status)}")


def describe(status: Status) -> str:
    """Loss, rate and state of a status in one line."""
    rate = "-" if status.steps_per_s is None else f"{status.steps_per_s:.1f}"
    state = "-" if status.state_bytes is None else decimal(status.state_bytes)
    loss = status.loss / math.log(2)
    return f"loss {loss:.2f} bits/byte · {rate} steps/s · optimizer state {state}"


def table(summary: Summary) -> Group:
    """The numbers that a reader came for, each beside what it is measured against."""
    rows = Table(show_header=False, box=HORIZONTALS)
    rows.add_column("what")
    rows.add_column("how much", justify="right", style="bold")
    rows.add_column("beside")
    for row in _rows(summary):
        rows.add_row(*row)
    return Group(Text(_title(summary), style="bold"), rows)


def _title(summary: Summary) -> str:
    return (
        f"A Transformer of {summary.parameter_count:,} parameters, {_count(summary.steps, 'step')} "
        f"by {_count(summary.workers, 'worker')} through {_count(summary.shards, 'shard')}"
    )


def _rows(summary: Summary) -> list[tuple[str, str, str]]:
    held_out = f"{summary.predicted_bytes:,} bytes of {_count(summary.held_out_files, 'file')}"
    trained = f"{decimal(summary.training_bytes)} of {_count(summary.training_files, 'other file')}"
    rate = "-" if summary.steps_per_s is None else f"{summary.steps_per_s:.1f} steps/s"
    pushes = summary.push_count
    return [
        ("held-out, before", f"{summary.bits_before:.2f} bits/byte", held_out),
        ("held-out, after", f"{summary.bits_after:.2f} bits/byte", f"trained on {trained}"),
        ("optimizer state", decimal(summary.state_bytes), _beside_adam(summary)),
        ("speed", rate, f"training took {summary.training_s:.0f} s"),
        ("longest step", f"{summary.longest_s:.1f} s", "with all that it waited for"),
        ("pushed", decimal(summary.pushed_bytes), _each("gradients", summary.pushed_bytes, pushes)),
        ("pulled", decimal(summary.pulled_bytes), _each("weights", summary.pulled_bytes, pushes)),
        ("weights", summary.weights[:16], "begin of their SHA-256"),
    ]


def _beside_adam(summary: Summary) -> str:
    adam = f"Adam would hold {decimal(summary.adam_bytes)}"
    if not summary.state_bytes:
        return adam
    return f"{adam}, {summary.adam_bytes / summary.state_bytes:.0f} times that"


def _each(what: str, moved_bytes: int, pushes: int) -> str:
    return f"{what}, {decimal(round(moved_bytes / pushes))} a worker and step"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def failure(error: WorkerFailed) -> Text:
    """Which worker failed, how, and the last that it wrote."""
    lines = [f"Worker {error.index} {error.reason}. The last that it wrote:", *error.last_lines]
    return Text("\n    ".join(lines), style="red")
