"""A step over gRPC: push, update and pull of GPT-2 small, over a bare stream of the same bytes.

One shard, one and two workers, all of them processes on the loopback; the shard has the first
core and the workers have the second. The bare stream is what gRPC can do with tensors: the bytes of
the model's gradients go up in pieces of 1 MiB into a tensor, and as many come down into the
model, without checksums, protocol or update. Both are taken in turns in one run.

It reports seconds, processor seconds of both sides, and the resident memory at its peak beside
what has to be held.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import torch
from machine import provenance
from shapes import GPT2_SMALL
from targets import Target, print_targets, target, write_json

import adashard
from adashard_server import LocalCluster

MIB = 1 << 20
MESSAGE_BYTES = 1 * MIB
WARM_UP = 2  # rounds that are thrown away: memory is touched for the first time
ASKED = {1: 0.82, 2: 0.88}
SPARE_BYTES = {"shard": 128 * MIB, "worker": 32 * MIB}
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_PUSH_PULL = "/bench.Bare/PushPull"
_spawning = multiprocessing.get_context("spawn")


# --- the bare stream -----------------------------------------------------------------------------


def pieces(tensors: list[torch.Tensor]) -> Iterator[bytes]:
    """The bytes of the tensors in messages; small tensors share one."""
    parts: list[memoryview] = []
    room = MESSAGE_BYTES
    for tensor in tensors:
        view = memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())
        while view.nbytes:
            part, view = view[:room], view[room:]
            parts.append(part)
            room -= part.nbytes
            if not room:
                yield b"".join(parts)
                parts, room = [], MESSAGE_BYTES
    if parts:
        yield b"".join(parts)


def fill(tensors: list[torch.Tensor], messages: Iterator[bytes]) -> None:
    """Copies messages of `pieces` into the tensors; copies drop the GIL."""
    view = memoryview(b"")
    for tensor in tensors:
        flat = tensor.detach().view(-1).view(torch.uint8)
        done = 0
        while done < flat.numel():
            if not view.nbytes:
                view = memoryview(next(messages))
            part = view[: flat.numel() - done]
            view = view[part.nbytes :]
            flat[done : done + part.nbytes].copy_(torch.frombuffer(part, dtype=torch.uint8))
            done += part.nbytes


def serve_bare(connection: Connection) -> None:
    """Serves bare streams in a process of its own, until the connection ends."""
    torch.set_num_threads(1)
    weights = [torch.ones(shape) for shape in GPT2_SMALL]
    sums = queue.SimpleQueue[list[torch.Tensor]]()  # one for each worker at once
    for _ in range(2):
        sums.put([torch.ones(shape) for shape in GPT2_SMALL])

    def push_pull(messages: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        total = sums.get()
        fill(total, messages)
        sums.put(total)
        yield from pieces(weights)

    server = grpc.server(ThreadPoolExecutor(8), options=_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(push_pull)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("bench.Bare", {"PushPull": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection.send(port)
    connection.recv()
    server.stop(None).wait()


# --- workers -------------------------------------------------------------------------------------


def work(connection: Connection, address: str, bare_port: int, workers: int) -> None:
    """Steps as it is told, and answers with seconds; in a process of its own."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(os.getpid())
    parameters = [torch.nn.Parameter(torch.randn(one, generator=generator)) for one in GPT2_SMALL]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    held = resident()
    optimizer = adashard.Adafactor(
        parameters, lr=None, address=address, job=f"bench-{workers}", min_workers=workers
    )
    channel = grpc.insecure_channel(f"127.0.0.1:{bare_port}", options=_OPTIONS)
    bare = channel.stream_stream(_PUSH_PULL)
    works = {
        "ours": optimizer.step,
        "bare": lambda: fill(parameters, iter(bare(pieces(gradients)))),
    }
    connection.send(None)
    while (command := connection.recv()) != "end":
        if command == "reset":
            reset_peak()
            connection.send(None)
        elif command == "peak":
            connection.send(peak() - held)
        else:
            began, spent = time.perf_counter(), time.process_time()
            works[command]()
            connection.send((time.perf_counter() - began, time.process_time() - spent))
    optimizer.close()
    channel.close()


def resident(pid: int | str = "self") -> int:
    """Resident bytes of a process."""
    return _status(pid, "VmRSS")


def peak(pid: int | str = "self") -> int:
    """The most bytes that a process has had resident since `reset_peak`."""
    return _status(pid, "VmHWM")


def reset_peak(pid: int | str = "self") -> None:
    """Begins to look for the peak anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _status(pid: int | str, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def processor_s(pid: int) -> float:
    """Seconds that all threads of a process have had of the processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- the measurement -----------------------------------------------------------------------------


def measure(workers: int, rounds: int) -> dict[str, Any]:
    """Steps and bare streams in turns, with so many workers at once."""
    cores = sorted(os.sched_getaffinity(0))
    first, last = {cores[0]}, {cores[-1]}
    mine, theirs = _spawning.Pipe()
    os.sched_setaffinity(0, first)  # what is started now stays there
    bare = _spawning.Process(target=serve_bare, args=(theirs,), daemon=True)
    bare.start()
    with LocalCluster(shards=1, restart=False) as cluster:
        shard = cluster.processes["shard-0"].pid
        before = resident(shard)
        reset_peak(shard)
        os.sched_setaffinity(0, last)
        bare_port = mine.recv()
        crew = [started(cluster.address, bare_port, workers) for _ in range(workers)]
        for _, connection in crew:
            connection.recv()
        pids = {"ours": shard, "bare": bare.pid or 0}
        spent: dict[str, list[tuple[float, float, float]]] = {"ours": [], "bare": []}
        for turn in range(WARM_UP + rounds):
            for name in ["ours", "bare"][:: 1 - 2 * (turn % 2)]:
                found = one(name, pids[name], [connection for _, connection in crew])
                if turn >= WARM_UP:
                    spent[name].append(found)
        peaks = [asked(connection, "peak") for _, connection in crew]
        shard_peak = peak(shard) - before
        for process, connection in crew:
            connection.send("end")
            process.join(60)
    os.sched_setaffinity(0, cores)
    mine.send(None)
    bare.join(60)
    return summary(spent, shard_peak, max(peaks))


def started(address: str, bare_port: int, workers: int) -> tuple[Any, Connection]:
    """A worker's process and the connection to it."""
    mine, theirs = _spawning.Pipe()
    process = _spawning.Process(
        target=work, args=(theirs, address, bare_port, workers), daemon=True
    )
    process.start()
    return process, mine


def asked(connection: Connection, command: str) -> Any:
    """What a worker answers."""
    connection.send(command)
    return connection.recv()


def one(name: str, server: int, crew: list[Connection]) -> tuple[float, float, float]:
    """Seconds of one round, of all workers at once; processor seconds of workers and server."""
    before = processor_s(server)
    for connection in crew:
        connection.send(name)
    found = [connection.recv() for connection in crew]
    return (
        max(seconds for seconds, _ in found),
        sum(processor for _, processor in found),
        processor_s(server) - before,
    )


def summary(
    spent: dict[str, list[tuple[float, float, float]]], shard_peak: int, worker_peak: int
) -> dict[str, Any]:
    """Medians, and the memory beside what has to be held: masters, one sum, state."""
    model = 4 * sum(torch.Size(shape).numel() for shape in GPT2_SMALL)
    found: dict[str, Any] = {
        name: dict(
            zip(
                ("seconds", "worker_cpu_s", "server_cpu_s"),
                (statistics.median(column) for column in zip(*rows, strict=True)),
                strict=True,
            )
        )
        for name, rows in spent.items()
    }
    pairs = zip(spent["bare"], spent["ours"], strict=True)
    found["ratio"] = statistics.median(bare[0] / ours[0] for bare, ours in pairs)
    found["shard_peak_over_held"] = shard_peak - 2 * model
    found["worker_peak_over_held"] = worker_peak
    return found


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    targets: list[Target] = []
    for workers in arguments.workers:
        found = results[f"{workers} workers"] = measure(workers, arguments.rounds)
        print(f"{workers} workers: {found}")
        name = f"a bare stream over a step, {workers} workers"
        targets.append(target(name, ASKED[workers], found["ratio"], "higher"))
        for who, spare in SPARE_BYTES.items():
            name = f"peak memory of a {who} beside its data, over its allowance, {workers} workers"
            over = found[f"{who}_peak_over_held"]
            targets.append(target(name, 1.0, over / spare, "lower"))
    print_targets(targets)
    report = {**provenance("benchmarks/pushpull.py"), "results": results, "targets": targets}
    write_json(arguments.json, report)


if __name__ == "__main__":
    main()
