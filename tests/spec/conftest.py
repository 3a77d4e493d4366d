"""The promises, checked on real clusters: the same tests in this process and on processes."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest
import torch
from torch import Tensor

import adashard
from adashard_server import LocalCluster

_names = itertools.count(1)


@dataclass
class Bench:
    """A running cluster and a job name that no other test has used."""

    cluster: LocalCluster
    job: str

    def adafactor(self, params, **options) -> adashard.Adafactor:
        options = {"address": self.cluster.address, "job": self.job, **options}
        return adashard.Adafactor(params, **options)

    def get(self, path: str):
        return httpx.get(f"{self.cluster.url}{path}", trust_env=False).json()

    def workers(self) -> list[dict]:
        return self.get(f"/api/v1/workers?job={self.job}")["items"]

    def until(self, condition: Callable[[], bool]) -> None:
        """Asks again until the condition holds; the test's own timeout is the limit."""
        while not condition():
            pass


class Clusters:
    """Clusters by kind and number of shards, started when first needed, shared by all tests."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._running: dict[tuple[str, int], LocalCluster] = {}

    def get(self, kind: str, shards: int) -> LocalCluster:
        if (kind, shards) not in self._running:
            cluster = LocalCluster(shards, in_process=kind == "threads", spare=False)
            self._running[kind, shards] = self._stack.enter_context(cluster)
        return self._running[kind, shards]

    def bench(self, kind: str, shards: int) -> Bench:
        return Bench(self.get(kind, shards), f"job-{next(_names)}")

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="session")
def clusters() -> Iterator[Clusters]:
    torch.set_num_threads(1)
    running = Clusters()
    yield running
    running.close()


@pytest.fixture(params=["threads", "processes"])
def kind(request) -> str:
    """Where the cluster runs: threads of this process, or processes."""
    return request.param


rarely_on_processes = pytest.mark.parametrize(
    "kind", ["threads", pytest.param("processes", marks=pytest.mark.slow)], indirect=True
)
"""For what other tests have shown of processes already: starting them takes seconds of torch."""


@pytest.fixture
def bench(clusters, kind) -> Callable[[int], Bench]:
    """Makes a bench with so many shards."""

    def make(shards: int = 2) -> Bench:
        return clusters.bench(kind, shards)

    return make


class Feed:
    """Parameters that are fed recorded gradients instead of a loss."""

    def __init__(self, start: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.parameters = {
            name: torch.nn.Parameter(value.to(dtype, copy=True)) for name, value in start.items()
        }

    def named(self) -> list[tuple[str, Tensor]]:
        return list(self.parameters.items())

    def give(self, gradients: dict[str, Tensor | None]) -> None:
        for name, parameter in self.parameters.items():
            gradient = gradients.get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype, copy=True)

    def weights(self) -> dict[str, Tensor]:
        return {name: one.detach().clone() for name, one in self.parameters.items()}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(*actions: Callable[[], object]) -> list[object]:
    """Runs the actions of several workers at once; what each returned, or the first error."""
    results: list[object] = [None] * len(actions)

    def run(index: int) -> None:
        try:
            results[index] = actions[index]()
        except BaseException as error:
            results[index] = error

    threads = [
        threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(actions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a worker hangs"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def tolerance(reference: Tensor, start: Tensor, step: int) -> float:
    """The goldens' bound: what rounding explains after so many steps."""
    change = (reference - start).square().mean().sqrt().item()
    return 3e-5 * change + 4.0 * step * 2.0**-24 * reference.abs().max().item()
