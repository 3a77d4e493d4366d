"""What the workers of a demo have told so far, and what follows from it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from adashard_server.demo.figures import Figures
from adashard_server.demo.progress import Began, Evaluated, Progress, Stepped
from adashard_server.demo.report import Status, Summary
from adashard_server.demo.worker import Task

SMOOTHED_STEPS = 20


class Story:
    """Takes in progress, gives out where the training stands.

    Args:
        tasks: of all workers, in order of their numbers.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._losses: deque[float] = deque(maxlen=SMOOTHED_STEPS * len(tasks))
        self._began: Began | None = None
        self._evaluated: dict[int, Evaluated] = {}
        self._first: Stepped | None = None
        self._last: Stepped | None = None
        self._longest_s = 0.0
        self._push_count = 0

    def add(self, index: int, progress: Progress) -> None:
        """Takes in what worker `index` has told."""
        match progress:
            case Began():
                self._began = progress
            case Evaluated(step=step):
                self._evaluated[step] = progress
            case Stepped():
                self._losses.append(progress.loss)
                self._push_count += 1
                if index == 0:
                    self._follow(progress)

    @property
    def step(self) -> int:
        """Steps that the first worker has taken."""
        return self._last.step if self._last else 0

    def status(self, figures: Figures | None) -> Status | None:
        """Where the training stands; None before the first step."""
        if self._last is None:
            return None
        return Status(
            step=self._last.step,
            steps=self._tasks[0].steps,
            loss=sum(self._losses) / len(self._losses),
            steps_per_s=self._steps_per_s(),
            state_bytes=(figures.state_bytes or None) if figures else None,
        )

    def summary(self, figures: Figures, shards: int) -> Summary:
        """What came of it; once all workers have told all."""
        steps = self._tasks[0].steps
        before, after = self._evaluated[0], self._evaluated[steps]
        assert self._began is not None
        assert self._last is not None
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
            training_s=self._last.elapsed_s,
            pushed_bytes=figures.pushed_bytes,
            pulled_bytes=figures.pulled_bytes,
            push_count=self._push_count,
            longest_s=self._longest_s,
            weights=after.weights,
        )

    def _follow(self, stepped: Stepped) -> None:
        """Takes in a step of the worker that time is taken of."""
        if self._last is not None:
            self._longest_s = max(self._longest_s, stepped.elapsed_s - self._last.elapsed_s)
        self._first, self._last = self._first or stepped, stepped

    def _steps_per_s(self) -> float | None:
        """Since the first step, which also waited for all workers to come."""
        if self._first is None or self._last is None or self._first is self._last:
            return None
        elapsed_s = self._last.elapsed_s - self._first.elapsed_s
        return (self._last.step - self._first.step) / elapsed_s
