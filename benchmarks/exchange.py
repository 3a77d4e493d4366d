"""What exactness costs: the exchange of a step, and sums in a written order.

Three questions, each answered by a ratio of two things that are measured in turns in one run:

    step         a step of the GPT-2 small list with split parameters, over one with whole ones,
                 on the same four shard processes; and the bytes of the exchange
    processor    CPU seconds of update and exchange of a 50257 x 768 parameter, summed over four
                 shards, over those of one; and those of one over those without slices
    order        the update with its sums in a written order, over the same loops compiled with
                 leave to reorder and fuse (fastmath)
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from machine import provenance
from one_thread import OneThread
from shapes import GPT2_SMALL
from targets import Target, print_targets, target, write_json
from turns import in_turns, ratio

import adashard
from adashard.wire import codec
from adashard.wire.messages import ExchangeRequest
from adashard_server import LocalCluster
from adashard_server.optim.kernels import cpu
from adashard_server.shard.exchange import MemoryExchange

SHARDS = 4
WHOLE = 1 << 30  # slice_bytes that splits nothing
SPLIT = 4 << 20
EMBEDDING = (50257, 768)
MATRICES = ((768, 3072), (3072, 768), (4096, 4096), EMBEDDING)


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
        seconds = in_turns({name: model.step_s for name, model in models.items()}, rounds)
        for model in models.values():
            model.optimizer.close()
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    return {
        "split_s": medians["split"],
        "whole_s": medians["whole"],
        "ratio": ratio(seconds["split"], seconds["whole"]),
        "spread": (max(seconds["split"]) - min(seconds["split"])) / medians["split"],
    }


def measure_bytes() -> dict[str, float]:
    """Bytes of all reports of a step, counted as they are sent, against one worker's push."""
    sent: list[int] = []
    send = MemoryExchange.send

    def counting(self: MemoryExchange, report: Any, peers: Any, wanted: Any, deliver: Any) -> None:
        for peer in peers:
            request = ExchangeRequest(receiver=peer.id, report=report, wanted=peer.id in wanted)
            sent.append(codec.to_proto(request).ByteSize())
        send(self, report, peers, wanted, deliver)

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
    """CPU seconds of update and exchange on one shard and on four, in turns; and in one slice."""
    split, unsplit = OneThread([EMBEDDING], SPLIT), OneThread([EMBEDDING], WHOLE)
    works = {
        "one": lambda: split.step_s(1),
        "several": lambda: split.step_s(SHARDS),
        "unsplit": lambda: unsplit.step_s(1),
    }
    seconds = in_turns(works, rounds)
    return {
        **{f"{name}_s": statistics.median(spent) for name, spent in seconds.items()},
        "ratio": ratio(seconds["several"], seconds["one"]),
        "ratio_to_unsplit": ratio(seconds["one"], seconds["unsplit"]),
    }


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
    parser.add_argument("--rounds", type=int, default=9, help="of steps; of short works more (9)")
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
        found["processor"] = measure_processor(4 * arguments.rounds)
        print("processor:", found["processor"])
    if arguments.only in (None, "step"):
        found["bytes"] = measure_bytes()
        print("bytes:", found["bytes"])
        found["step"] = measure_step(arguments.rounds)
        print("step:", found["step"])
    found["targets"] = targets(found)
    print_targets(found["targets"])
    write_json(arguments.json, found)


def targets(found: dict[str, Any]) -> list[Target]:
    """What was asked, of what was measured."""
    order = found.get("order", {})
    names = {
        "processor": ("CPU of update and exchange: 4 shards / 1", 1.05),
        "bytes": ("bytes of reports / of one push, 4 shards", 0.005),
        "step": ("step: split / whole parameters, 4 shards", 1.05),
    }
    return [
        *(
            target(f"written order / fastmath, {shape}", 1.12, of_shape["ratio"], "lower")
            for shape, of_shape in order.items()
        ),
        *(
            target(name, asked, found[key]["ratio"], "lower")
            for key, (name, asked) in names.items()
            if key in found
        ),
    ]


if __name__ == "__main__":
    main()
