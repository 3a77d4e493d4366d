"""Worker processes that join jobs and take steps as they are told, and say how long these took."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

import adashard
from adashard_server.demo.model import BYTES, Size, Transformer

DEMO = "demo"
"""Instead of shapes: the demo's model, which is then trained if so told."""

Shapes = Sequence[tuple[int, ...]] | str
_ANSWER_S = 300.0
_WINDOWS = 4
_spawning = multiprocessing.get_context("spawn")


class Worker:
    """One worker's model and optimizer, in its process."""

    def __init__(self, rank: int) -> None:
        self._generator = torch.Generator().manual_seed(rank)
        self._optimizer: adashard.Adafactor | None = None
        self._model: Transformer | None = None

    def join(self, shapes: Shapes, address: str, job: str, workers: int) -> None:
        """Takes part in a job, with gradients that stay."""
        parameters = self._parameters(shapes)
        for _, parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=self._generator)
        self._optimizer = adashard.Adafactor(
            parameters, address=address, job=job, min_workers=workers
        )

    def _parameters(self, shapes: Shapes) -> list[tuple[str, nn.Parameter]]:
        torch.manual_seed(0)  # all workers begin with the same weights
        if isinstance(shapes, str):
            self._model = Transformer(Size())
            return list(self._model.named_parameters())
        return [(f"w{n}", nn.Parameter(torch.randn(shape))) for n, shape in enumerate(shapes)]

    def steps_s(self, count: int, training: bool) -> list[float]:
        """Seconds of so many steps, each with forward and backward if `training`."""
        assert self._optimizer is not None
        spent = []
        for _ in range(count):
            began = time.perf_counter()
            if training:
                self._differentiate()
            self._optimizer.step()
            spent.append(time.perf_counter() - began)
        return spent

    def _differentiate(self) -> None:
        assert self._model is not None
        length = self._model.size.context + 1
        window: Tensor = torch.randint(BYTES, (_WINDOWS, length), generator=self._generator)
        self._model.zero_grad()
        self._model.loss(window).backward()

    def leave(self) -> None:
        """Ends the part in the job, and forgets the model."""
        assert self._optimizer is not None
        self._optimizer.close()
        self._optimizer = self._model = None


def _work(connection: Connection, rank: int) -> None:
    torch.set_num_threads(1)
    worker = Worker(rank)
    connection.send("ready")
    while (order := connection.recv()) is not None:
        name, arguments = order
        connection.send(getattr(worker, name)(*arguments))


class Crew:
    """Worker processes, from `with` to its end. Each order is carried out by some at once."""

    def __init__(self, size: int) -> None:
        self._members: list[tuple[Any, Connection]] = []
        for rank in range(size):
            mine, theirs = _spawning.Pipe()
            process = _spawning.Process(target=_work, args=(theirs, rank), daemon=True)
            process.start()
            theirs.close()  # so that a process that ends is heard
            self._members.append((process, mine))

    def __enter__(self) -> Self:
        for _, connection in self._members:
            _heard(connection)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process, _ in self._members:
            process.kill()
            process.join()

    def do(self, workers: int, order: str, *arguments: Any) -> list[Any]:
        """What the first so many workers answer to an order: a method of `Worker`.

        Raises:
            EOFError: a worker has ended, and has said why on standard error.
            TimeoutError: a worker has not answered.
        """
        chosen = [connection for _, connection in self._members[:workers]]
        for connection in chosen:
            connection.send((order, arguments))
        return [_heard(connection) for connection in chosen]

    def steps_s(self, workers: int, count: int, *, training: bool = False) -> list[float]:
        """Seconds of each step of workers that have joined: those of the slowest."""
        spent = self.do(workers, "steps_s", count, training)
        return [max(one) for one in zip(*spent, strict=True)]


def _heard(connection: Connection) -> Any:
    if not connection.poll(_ANSWER_S):
        raise TimeoutError(f"a worker has said nothing for {_ANSWER_S:.0f} s")
    return connection.recv()
