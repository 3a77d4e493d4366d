"""A worker process that trains what it is told to: one order a line on stdin, one answer a line.

Gradients depend on the weights, the worker's number and the step, and on nothing else. So one bit
that differs anywhere spreads into all later weights, and their SHA-256 is that of the whole run.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import Any, TextIO

import torch

import adashard
from adashard.wire.errors import AdashardError

SHAPES = {
    "embedding": (640, 1024),  # 2.6 MB: several slices on each shard, several frames in a reply
    "wide": (48, 2048),  # cut into columns
    "stack": (3, 24, 40),
    "vector": (1000,),
    "scalar": (),
}
SLICE_BYTES = 1 << 18


class Trainee:
    """The model of one worker, and its part in one job after the other.

    Args:
        say: takes what an order leads to.
    """

    def __init__(self, say: TextIO) -> None:
        self._say = say
        self._optimizer: adashard.Adafactor | None = None
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._index = 0

    def join(self, address: str, job: str, index: int, workers: int) -> None:
        """Begins to take part, with the weights that all begin with."""
        generator = torch.Generator().manual_seed(0)
        self._parameters = {
            name: torch.nn.Parameter(torch.randn(shape, generator=generator))
            for name, shape in SHAPES.items()
        }
        self._index = index
        self._optimizer = adashard.Adafactor(
            list(self._parameters.items()),
            address=address,
            job=job,
            min_workers=workers,
            slice_bytes=SLICE_BYTES,
        )

    def train(self, until: int) -> None:
        """Steps until the job has taken so many; says of each when it ended and how many took part.

        At the end it says what it has come to.
        """
        optimizer = self._joined()
        while optimizer.global_step < until:
            self._feed(optimizer.global_step + 1)
            optimizer.step()
            session = optimizer._session
            assert session is not None
            record = session._worker.record
            self._tell(
                step=optimizer.global_step,
                ended_s=time.monotonic(),
                workers=len(record.workers) if record else 0,
            )
        self._tell(digest=self._digest(), at=optimizer.global_step)

    def leave(self) -> None:
        """Leaves the job."""
        self._joined().close()
        self._tell(left=True)

    def _joined(self) -> adashard.Adafactor:
        assert self._optimizer is not None, "the first order is to join"
        return self._optimizer

    def _feed(self, step: int) -> None:
        generator = torch.Generator().manual_seed(1000 * step + self._index)
        for parameter in self._parameters.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = noise.add_(parameter.detach(), alpha=0.01)

    def _digest(self) -> str:
        found = hashlib.sha256()
        for parameter in self._parameters.values():
            found.update(parameter.detach().numpy().tobytes())
        return found.hexdigest()

    def _tell(self, **facts: Any) -> None:
        print(json.dumps(facts), file=self._say, flush=True)


def main() -> None:
    """Does what it is told until there is nothing more to read."""
    torch.set_num_threads(1)
    say, sys.stdout = sys.stdout, sys.stderr
    trainee = Trainee(say)
    print(json.dumps({"ready": True}), file=say, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            getattr(trainee, order.pop("do"))(**order)
        except AdashardError as error:
            print(json.dumps({"error": f"{error.reason}: {error}"}), file=say, flush=True)


if __name__ == "__main__":
    main()
