"""One worker of the demo: a plain torch script with one line that is not torch's own.

    python -m adashard_server.demo.worker --address 127.0.0.1:50051 --workers 2 --index 0

tells its progress on stdout and everything else on stderr. Workers differ in the batches that they
draw and in nothing else: equal seeds build equal models, so no first gradient goes to waste.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol, TextIO

import torch
from torch import Tensor

import adashard
from adashard_server.demo.corpus import Corpus, batches, read_corpus, sample
from adashard_server.demo.model import Size, Transformer
from adashard_server.demo.progress import Began, Evaluated, Progress, Stepped, to_line

JOB = "demo"
WINDOWS_PER_BATCH = 4
WINDOWS_HELD_OUT = 256

Tell = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one worker is to do.

    Attributes:
        address: host:port of the coordinator.
        index: this worker's number; number 0 also measures the held-out text.
        workers: how many there are.
        steps: how many the job takes.
        seed: of the initial weights and of the batches.
    """

    address: str
    index: int
    workers: int
    steps: int
    seed: int

    def arguments(self) -> list[str]:
        """The command line that `parse` reads this from."""
        return [f"--{name}={getattr(self, name)}" for name in self.__dataclass_fields__]


class Optimizer(Protocol):
    """What the loop needs of an optimizer: torch's methods, and `log`."""

    def zero_grad(self) -> None:
        """Forgets the gradients."""

    def step(self) -> object:
        """Turns gradients into fresh weights."""

    def log(self, *, loss: Tensor) -> None:
        """Shows the loss on the page."""


def train(
    model: Transformer,
    optimizer: Optimizer,
    windows: Iterable[Tensor],
    *,
    steps: int,
    tell: Tell,
) -> None:
    """Takes `steps` steps, a batch of `windows` each, and tells of every one."""
    began_s = time.monotonic()
    for step, batch in enumerate(islice(windows, steps), start=1):
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.log(loss=loss)
        tell(Stepped(step=step, loss=loss.item(), elapsed_s=time.monotonic() - began_s))


def work(task: Task, tell: Tell) -> None:
    """Trains the model through the service, from its first weights to its last."""
    torch.manual_seed(task.seed)
    model = Transformer(Size())
    corpus = read_corpus()
    length = model.size.context + 1
    held_out = sample(corpus.held_out, count=WINDOWS_HELD_OUT, length=length)
    windows = batches(
        corpus.training,
        count=WINDOWS_PER_BATCH,
        length=length,
        stream=f"seed {task.seed}, worker {task.index}",
    )
    tell(_began(model, corpus))
    if task.index == 0:
        tell(_evaluated(model, held_out, step=0))
    with adashard.Adafactor(
        model.named_parameters(), address=task.address, job=JOB, min_workers=task.workers
    ) as optimizer:
        train(model, optimizer, windows, steps=task.steps, tell=tell)
    if task.index == 0:
        tell(_evaluated(model, held_out, step=task.steps))


def parse(arguments: Sequence[str] | None = None) -> Task:
    """The task that a command line describes; None for this process's own."""
    parser = argparse.ArgumentParser(prog="adashard_server.demo.worker", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    return Task(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Does the task of the command line."""
    torch.set_num_threads(1)  # a core for each worker; more would wait for one another
    tell = partial(_tell_line, sys.stdout)
    with contextlib.redirect_stdout(sys.stderr):
        work(parse(), tell)


def _tell_line(stream: TextIO, progress: Progress) -> None:
    print(to_line(progress), file=stream, flush=True)


def _began(model: Transformer, corpus: Corpus) -> Began:
    return Began(
        parameter_count=sum(parameter.numel() for parameter in model.parameters()),
        training_bytes=len(corpus.training),
        training_files=corpus.training_files,
        held_out_files=corpus.held_out_files,
    )


def _evaluated(model: Transformer, held_out: Tensor, *, step: int) -> Evaluated:
    return Evaluated(
        step=step,
        bits_per_byte=model.bits_per_byte(held_out),
        predicted_bytes=held_out[:, 1:].numel(),
        weights=_digest(model),
    )


def _digest(model: Transformer) -> str:
    """One name for all bits of the weights."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
