"""A parameter server in `torch.distributed.rpc`, in the form that PyTorch itself recommends.

Fair, because: the server is an `async_execution` function, which holds no thread while it waits
and takes one step for the pushes of all workers; tensors travel as tensors, over TensorPipe's own
choice of channels (on one machine the kernel copies from process to process); a worker takes the
tensors that arrive as its weights and copies nothing; glibc keeps the memory, and one thread
computes.
torch's optimizer is its fastest form, and `ours` puts the loops of our shards in its place.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

import torch
import torch.distributed.rpc as rpc
import torch.multiprocessing as multiprocessing
from torch import Tensor

from peers.gpt2 import WARM_UP, WORKERS, Mean, Steps, options, phase, save, slowest, tensors
from peers.optimizers import OPTIMIZERS

SERVER = "server"
LIMIT_S = 120.0


class Server:
    """Weights, and the round that is under way. One in the server's process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._weights = tensors(seed=0)
        self.begin(1, "torch")

    def begin(self, workers: int, optimizer: str) -> None:
        """A phase begins."""
        self._workers = workers
        self._optimizer = OPTIMIZERS[optimizer](self._weights)
        self._mean, self._future = Mean(), torch.futures.Future[list[Tensor]]()

    def push_pull(self, gradients: list[Tensor]) -> torch.futures.Future[list[Tensor]]:
        """Takes a worker's gradients; the future has the weights after the step."""
        with self._lock:
            future = self._future
            if self._mean.add(gradients) == self._workers:
                self._optimizer.step(self._mean.take())
                self._future = torch.futures.Future()
                future.set_result(self._weights)
            return future


class Worker:
    """A model with gradients that stay. One in each worker's process."""

    def __init__(self, rank: int) -> None:
        self._parameters = [torch.nn.Parameter(one) for one in tensors(seed=0)]
        self._gradients = tensors(seed=rank)

    def steps_s(self, count: int) -> list[float]:
        """Seconds of so many steps, each from the push to the weights in the model."""
        return [self._step_s() for _ in range(count)]

    def _step_s(self) -> float:
        began = time.perf_counter()
        weights = rpc.rpc_sync(SERVER, push_pull, args=(self._gradients,))
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.data = weight
        return time.perf_counter() - began


_here: Any = None  # this process's Server or Worker


def begin(workers: int, optimizer: str) -> None:
    """Called in the server: a phase begins."""
    _here.begin(workers, optimizer)


@rpc.functions.async_execution
def push_pull(gradients: list[Tensor]) -> torch.futures.Future[list[Tensor]]:
    """Called in the server by workers."""
    return _here.push_pull(gradients)


def steps_s(count: int) -> list[float]:
    """Called in a worker."""
    return _here.steps_s(count)


def serve(rank: int, port: int) -> None:
    """Is the server (0) or a worker, until the one that measures ends."""
    global _here
    torch.set_num_threads(1)
    _here = Server() if rank == 0 else Worker(rank)
    join(SERVER if rank == 0 else _worker(rank), rank, port)
    rpc.shutdown()


def join(name: str, rank: int, port: int) -> None:
    """Takes part in the group of server, workers and the one that measures."""
    backend = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=4, rpc_timeout=LIMIT_S, init_method=f"tcp://127.0.0.1:{port}"
    )
    world = max(WORKERS) + 2
    rpc.init_rpc(name, rank=rank, world_size=world, rpc_backend_options=backend)


def main() -> None:
    """Measures every phase."""
    arguments = options(__doc__)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TP_SOCKET_IFNAME", "lo")
    port = _free_port()
    ranks = range(max(WORKERS) + 1)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=serve, args=(rank, port)) for rank in ranks]
    for process in processes:
        process.start()
    join("observer", len(processes), port)
    steps = Steps()
    for workers in WORKERS:
        for optimizer in arguments.optimizers:
            rpc.rpc_sync(SERVER, begin, args=(workers, optimizer))
            told = [
                rpc.rpc_async(_worker(rank), steps_s, args=(WARM_UP + arguments.steps,))
                for rank in range(1, workers + 1)
            ]
            steps[phase(workers, optimizer)] = slowest([one.wait() for one in told])
    save(arguments.results, steps)
    rpc.shutdown()
    for process in processes:
        process.join()


def _worker(rank: int) -> str:
    return f"worker-{rank}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    # As a module of this name in every process: functions travel by it.
    from peers import torch_rpc

    torch_rpc.main()
