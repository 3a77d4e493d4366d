"""What exactness costs: the exchange of a step, and sums in a written order.

Three questions, each answered by a ratio of two things that are measured in turns in one run:

    step         a step of the GPT-2 small list with split parameters, over one with whole ones,
                 on the same four shard processes; and the bytes of the exchange
    processor    CPU seconds of update and exchange of a 50257 x 768 parameter, summed over four
                 shards, over those of one
    order        the update with its sums in a written order, over the same loops compiled with
                 leave to reorder and fuse (fastmath)
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from machine import provenance
from shapes import GPT2_SMALL

import adashard
from adashard.wire import codec
from adashard_server import LocalCluster
from adashard_server.optim.kernels import cpu
from adashard_server.shard.exchange import MemoryExchange
from adashard_server.shard.rounds import Rounds
from adashard_server.shard.slices import SliceStore

SHARDS = 4
WHOLE = 1 << 30  # slice_bytes that splits nothing
SPLIT = 4 << 20
EMBEDDING = (50257, 768)
MATRICES = ((768, 3072), (3072, 768), (4096, 4096), EMBEDDING)
WARM_UP = 2  # rounds that are thrown away: memory is touched for the first time


class Model:
    """Parameters of the given shapes with a gradient that stays, and an optimizer for them."""

    def __init__(
        self, cluster: LocalCluster, job: str, shapes: list[tuple[int, ...]], slice_bytes: int
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [
            torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
        ]
        for parameter in self.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer = adashard.Adafactor(
            self.parameters, address=cluster.address, job=job, slice_bytes=slice_bytes
        )

    def step_s(self) -> float:
        began = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - began


def measure_step(rounds: int) -> dict[str, float]:
    """Seconds of a step, split and whole, in turns on the same shards."""
    with LocalCluster(shards=SHARDS) as cluster:
        models = {
            name: Model(cluster, name, GPT2_SMALL, slice_bytes)
            for name, slice_bytes in (("split", SPLIT), ("whole", WHOLE))
        }
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(WARM_UP + rounds):
            for name, model in models.items():
                spent = model.step_s()
                if turn >= WARM_UP:
                    seconds[name].append(spent)
        for model in models.values():
            model.optimizer.close()
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    return {
        "split_s": medians["split"],
        "whole_s": medians["whole"],
        "ratio": medians["split"] / medians["whole"],
        "spread": (max(seconds["split"]) - min(seconds["split"])) / medians["split"],
    }


def measure_bytes() -> dict[str, float]:
    """Bytes of all reports of a step, counted as they are sent, against one worker's push."""
    sent: list[int] = []
    send = MemoryExchange.send

    def counting(self: MemoryExchange, peer: Any, request: Any, deliver: Any) -> None:
        sent.append(codec.to_proto(request).ByteSize())
        send(self, peer, request, deliver)

    with (
        mock.patch.object(MemoryExchange, "send", counting),
        LocalCluster(shards=SHARDS, in_process=True) as cluster,
    ):
        model = Model(cluster, "bytes", GPT2_SMALL, SPLIT)
        model.step_s()
        sent.clear()
        model.step_s()
        model.optimizer.close()
    push = sum(parameter.nbytes for parameter in model.parameters)
    return {"exchanged": sum(sent), "pushed": push, "ratio": sum(sent) / push}


def measure_processor(rounds: int) -> dict[str, float]:
    """CPU seconds of update and exchange on one shard and on four, in turns."""
    seconds: dict[int, list[float]] = {1: [], SHARDS: []}
    with cpu_counted() as counted:
        for _ in range(rounds):
            for shards, spent in seconds.items():
                with LocalCluster(shards=shards, in_process=True) as cluster:
                    model = Model(cluster, "job", [EMBEDDING], SPLIT)
                    for turn in range(WARM_UP + 3):
                        if turn == WARM_UP:
                            counted.clear()
                        model.step_s()
                    spent.append(sum(counted) / 3)
                    model.optimizer.close()
    one, several = (statistics.median(spent) for spent in seconds.values())
    return {"one_s": one, "several_s": several, "ratio": several / one}


@contextmanager
def cpu_counted() -> Iterator[list[float]]:
    """Collects CPU seconds that threads spend in measuring, updating, deciding and reporting.

    Passes are made one at a time: shards of one machine that make theirs together wait for its
    memory, and shards of several machines do not.
    """
    counted: list[float] = []
    inside = set[int]()
    one_at_a_time = threading.Lock()

    def wrapped(function: Callable[..., Any], lock: Any) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            thread = threading.get_ident()
            if thread in inside:
                return function(*arguments, **named)
            inside.add(thread)
            try:
                with lock:
                    began = time.thread_time()
                    try:
                        return function(*arguments, **named)
                    finally:
                        counted.append(time.thread_time() - began)
            finally:
                inside.discard(thread)

        return timed

    targets = (
        (SliceStore, "measure", one_at_a_time),
        (SliceStore, "apply", one_at_a_time),
        (Rounds, "measured", nullcontext()),
        (Rounds, "exchange", nullcontext()),
        (MemoryExchange, "send", nullcontext()),
    )
    with ExitStack() as patches:
        for owner, name, lock in targets:
            timed = wrapped(getattr(owner, name), lock)
            patches.enter_context(mock.patch.object(owner, name, timed))
        yield counted


def measure_order(rounds: int) -> dict[str, dict[str, float]]:
    """Nanoseconds per element of both passes, in a written order and with fastmath."""
    loose = with_fastmath()
    return {f"{n}x{m}": _order_of(loose, n, m, rounds) for n, m in MATRICES}


def with_fastmath() -> ModuleType:
    """The same loops, compiled with leave to reorder and to fuse."""
    source = Path(cpu.__file__).read_text()
    assert source.count('error_model="numpy"') == 1
    source = source.replace('error_model="numpy"', 'error_model="numpy", fastmath=True')
    source = source.replace("cache=True", "cache=False")
    module = ModuleType("loose")
    exec(compile(source, "loose.py", "exec"), module.__dict__)
    return module


def _order_of(loose: ModuleType, n: int, m: int, rounds: int) -> dict[str, float]:
    generator = np.random.default_rng(0)
    gradient = generator.standard_normal((1, n, m), np.float32)
    weight = generator.standard_normal((1, n, m), np.float32)
    row, column = np.ones((1, n), np.float32), np.ones((1, m), np.float32)
    new, squares, ratios = np.empty_like(row), np.empty_like(column), np.empty_like(column)
    one, tiny = np.float32(1.0), np.float32(1e-9)

    def passes(module: ModuleType) -> None:
        bound = np.float32(1e30)
        module.rows_first(gradient, one, row, 0.5, 1e-30, bound, new, squares, ratios)
        infinite = np.float32(np.inf)
        module.update(weight, gradient, one, tiny, row, column, infinite, one)

    flat, target = torch.from_numpy(gradient).view(-1), torch.from_numpy(weight).view(-1)

    def floor(_: ModuleType) -> None:
        """The traffic that nothing can avoid: one read of G, and X -= c G."""
        torch.sum(flat)
        target.sub_(flat, alpha=1e-9)

    kinds = {"written": (passes, cpu), "fastmath": (passes, loose), "floor": (floor, cpu)}
    spent: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(1 + rounds):
        for name, (work, module) in kinds.items():
            began = time.perf_counter()
            work(module)
            if turn:
                spent[name].append((time.perf_counter() - began) / (n * m) * 1e9)
    found = {f"{name}_ns": statistics.median(times) for name, times in spent.items()}
    return {**found, "ratio": found["written_ns"] / found["fastmath_ns"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="of each measurement (9)")
    parser.add_argument("--only", choices=("step", "processor", "order"))
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = provenance("benchmarks/exchange.py")
    if arguments.only in (None, "order"):
        found["order"] = measure_order(arguments.rounds)
        for name, numbers in found["order"].items():
            print(f"order {name}:", numbers)
    if arguments.only in (None, "processor"):
        found["processor"] = measure_processor(max(3, arguments.rounds // 3))
        print("processor:", found["processor"])
    if arguments.only in (None, "step"):
        found["bytes"] = measure_bytes()
        print("bytes:", found["bytes"])
        found["step"] = measure_step(arguments.rounds)
        print("step:", found["step"])
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
