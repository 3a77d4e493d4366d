"""A parameter server as an actor of Ray, with arrays in Ray's object store.

Fair, because: gradients and weights travel as numpy arrays, which Ray keeps in shared memory and
hands out without a copy, so that each direction costs one copy in and one out; the weights are put
there once for all workers; the actor is asynchronous and takes one step for the pushes of all
workers; the store's memory is touched beforehand; no process has a lower priority than the others;
glibc keeps the memory, and one thread computes.
torch's optimizer is its fastest form, and `ours` puts the loops of our shards in its place.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
import warnings

import numpy as np
import ray
import torch

from peers import loopback
from peers.gpt2 import WARM_UP, WORKERS, Mean, Steps, options, phase, save, slowest, tensors
from peers.optimizers import OPTIMIZERS

STORE_BYTES = 5 << 30  # the gradients of two workers and the weights, of two steps


@ray.remote(num_cpus=0)
class Server:
    """Weights, and the round that is under way."""

    def __init__(self) -> None:
        _quiet()
        self._weights = tensors(seed=0)
        self._scratch = tensors(seed=0)  # arrays that arrive are read-only

    async def begin(self, workers: int, optimizer: str) -> None:
        """A phase begins."""
        self._workers = workers
        self._optimizer = OPTIMIZERS[optimizer](self._weights)
        self._mean = Mean()
        self._round: asyncio.Future[list[ray.ObjectRef]] = asyncio.Future()

    async def push_pull(self, gradients: list[np.ndarray]) -> list[ray.ObjectRef]:
        """Takes a worker's gradients; a list with the reference of the weights after the step."""
        arrived = [torch.from_numpy(one) for one in gradients]
        if self._workers > 1 and self._mean.empty:
            torch._foreach_copy_(self._scratch, arrived)
            arrived = self._scratch
        current = self._round
        if self._mean.add(arrived) == self._workers:
            self._optimizer.step(self._mean.take())
            self._round = asyncio.Future()
            current.set_result([ray.put([weight.numpy() for weight in self._weights])])
        return await current


@ray.remote(num_cpus=0)
class Worker:
    """A model with gradients that stay."""

    def __init__(self, rank: int, server: ray.actor.ActorHandle) -> None:
        _quiet()
        self._server = server
        self._model = tensors(seed=0)
        self._gradients = [one.numpy() for one in tensors(seed=rank)]

    def steps_s(self, count: int) -> list[float]:
        """Seconds of so many steps, each from the push to the weights in the model."""
        return [self._step_s() for _ in range(count)]

    def _step_s(self) -> float:
        began = time.perf_counter()
        (reference,) = ray.get(self._server.push_pull.remote(self._gradients))
        weights = ray.get(reference)
        torch._foreach_copy_(self._model, [torch.from_numpy(one) for one in weights])
        return time.perf_counter() - began


def _quiet() -> None:
    """One thread, and no word of arrays that are read-only: nobody writes them."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*not writable.*")


def measure(steps: int, optimizers: list[str]) -> Steps:
    """Every phase, with the same server and workers."""
    server = Server.remote()
    workers = [Worker.remote(rank, server) for rank in range(1, max(WORKERS) + 1)]
    found = Steps()
    for count in WORKERS:
        for optimizer in optimizers:
            ray.get(server.begin.remote(count, optimizer))
            told = [worker.steps_s.remote(WARM_UP + steps) for worker in workers[:count]]
            found[phase(count, optimizer)] = slowest(ray.get(told))
    return found


def main() -> None:
    """Measures every phase."""
    arguments = options(__doc__)
    note = loopback.enter()
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        ray.init(
            num_cpus=4,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        try:
            save(arguments.results, measure(arguments.steps, arguments.optimizers), note)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
