"""A step over links of 1 and 10 Gbit/s: what narrower formats on the wire are worth there.

One shard and one worker, each in a network namespace of its own, with a link between them that is
shaped in both directions. The worker trains one model in several jobs, which differ in the formats
of gradients and weights alone, and takes their steps in turns. It needs root, and iproute2.

It also says how fast the link is for a plain TCP stream, and what `wire_dtype="auto"` chooses.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from machine import provenance
from namespaces import NoNamespaces, ThinLink
from targets import Target, print_targets, target, write_json
from turns import in_turns, ratio

import adashard
from adashard_server.launch.processes import ServerProcess

SHAPES = [(768, 3072), (3072,), (3072, 768), (768,)] * 4  # 75.5 MB in float32
FORMATS: dict[str, dict[str, Any]] = {
    "float32 both ways": {},
    "bfloat16 both ways": {"wire_dtype": "bfloat16", "reply_dtype": "bfloat16"},
    "int8 up, bfloat16 down": {"wire_dtype": "int8", "reply_dtype": "bfloat16"},
}
PLAIN, HALF, INT8 = FORMATS
ASKED = {(HALF, 1.0): 1.8, (INT8, 1.0): 2.4}
AUTO = "auto"
AUTO_STEPS = 5  # after which it has decided
STREAM_BYTES = 64 << 20


# --- the shard's end of the link ------------------------------------------------------------------


def serve(address: str) -> None:
    """Serves a cluster at `address`, and takes a plain stream, until standard input ends."""
    options: dict[str, object] = {"bind": address, "port": 0}
    coordinator = ServerProcess("coordinator", {**options, "http_port": 0, "min_shards": 1})
    try:
        coordinator.wait_ready()
        where = coordinator.said["address"]
        shard = ServerProcess("shard", {**options, "coordinator": where})
        try:
            shard.wait_ready()
            with socket.create_server((address, 0)) as listener:
                _say({"address": where, "stream": listener.getsockname()[1]})
                _take(listener)
            sys.stdin.read()
        finally:
            shard.stop()
    finally:
        coordinator.stop()


def _take(listener: socket.socket) -> None:
    """Takes a stream, and answers a byte once all of it has come."""
    connection, _ = listener.accept()
    with connection:
        buffer = bytearray(1 << 20)
        left = STREAM_BYTES
        while left:
            left -= connection.recv_into(buffer)
        connection.sendall(b"\0")


# --- the worker's end -----------------------------------------------------------------------------


def work(host: str, served: dict[str, Any]) -> None:
    """Takes the steps that standard input asks for by the job's name, and says their seconds."""
    torch.set_num_threads(1)
    _say(_stream_gbit_s(host, served["stream"]))
    steps = {name: _job(served["address"], name, named) for name, named in FORMATS.items()}
    steps[AUTO] = _job(served["address"], AUTO, {"wire_dtype": "auto"})
    said = _Said()
    logging.getLogger("adashard").addHandler(said)
    logging.getLogger("adashard").setLevel(logging.INFO)
    for line in sys.stdin:
        name = json.loads(line)
        began = time.perf_counter()
        steps[name].step()
        _say([time.perf_counter() - began, said.take()])
    for optimizer in steps.values():
        optimizer.close()


class _Said(logging.Handler):
    """Keeps what the log says of the format that was chosen."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "gradients travel" in record.getMessage():
            self._lines.append(record.getMessage())

    def take(self) -> list[str]:
        """What has been said since it was asked last."""
        lines, self._lines = self._lines, []
        return lines


def _job(address: str, name: str, named: dict[str, Any]) -> adashard.Adafactor:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(one, generator=generator)) for one in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return adashard.Adafactor(parameters, address=address, job=name.replace(" ", "-"), **named)


def _stream_gbit_s(host: str, port: int) -> float:
    """The speed of a plain stream, to the answer that all of it is there."""
    data = bytes(1 << 20)
    with socket.create_connection((host, port)) as connection:
        began = time.perf_counter()
        for _ in range(STREAM_BYTES // len(data)):
            connection.sendall(data)
        connection.recv(1)
        return 8e-9 * STREAM_BYTES / (time.perf_counter() - began)


def _say(value: object) -> None:
    print(json.dumps(value), flush=True)


# --- the measurement ------------------------------------------------------------------------------


class End:
    """This script at an end of the link."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def said(self) -> Any:
        """What it says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"an end of the link has failed: exit code {self._process.wait()}")
        return json.loads(line)

    def step_s(self, name: str) -> float:
        """Has it take a step of a job; its seconds."""
        return self.step(name)[0]

    def step(self, name: str) -> tuple[float, list[str]]:
        """The same, and what the log says of the format of gradients."""
        print(json.dumps(name), file=self._stdin, flush=True)
        seconds, lines = self.said()
        return seconds, lines

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin


@contextmanager
def started(link: ThinLink, end: int, *arguments: str) -> Iterator[End]:
    """This script at one end; it ends when it is left alone."""
    command = link.inside(end, [sys.executable, __file__, *arguments])
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield End(process)
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)
        finally:
            process.kill()


def measure(gbit_s: float, rounds: int) -> dict[str, Any]:
    """Steps over one link, in turns."""
    with ThinLink(gbit_s) as link:
        host = link.addresses[0]
        with started(link, 0, "--serve", host) as servers:
            served = servers.said()
            with started(link, 1, "--work", host, json.dumps(served)) as worker:
                stream = worker.said()
                works = {name: lambda name=name: worker.step_s(name) for name in FORMATS}
                spent = in_turns(works, rounds)
                auto = [worker.step(AUTO) for _ in range(AUTO_STEPS + rounds)]
    return {
        "gbit_s": gbit_s,
        "stream_gbit_s": stream,
        "seconds": {name: statistics.median(all_s) for name, all_s in spent.items()},
        "times_as_fast": {name: ratio(spent[PLAIN], spent[name]) for name in FORMATS},
        "auto_seconds": statistics.median(seconds for seconds, _ in auto[AUTO_STEPS:]),
        "auto_said": [line for _, lines in auto for line in lines],
    }


def targets_of(found: list[dict[str, Any]]) -> list[Target]:
    """What was asked, and what was reached."""
    return [
        target(
            f"{PLAIN} / {name}, seconds of a step at {one['gbit_s']:g} Gbit/s",
            ASKED[name, one["gbit_s"]],
            one["times_as_fast"][name],
            "higher",
        )
        for one in found
        for name in FORMATS
        if (name, one["gbit_s"]) in ASKED
    ]


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gbit", type=float, nargs="*", default=[1.0, 10.0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
    elif arguments.work:
        work(arguments.work[0], json.loads(arguments.work[1]))
    else:
        _measure_all(arguments)


def _measure_all(arguments: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # namespaces go with whoever made them
    found = []
    try:
        for gbit_s in arguments.gbit:
            found.append(measure(gbit_s, arguments.rounds))
            print(json.dumps(found[-1], indent=1), flush=True)
    except NoNamespaces as refusal:
        sys.exit(f"thin links cannot be measured here: {refusal}")
    targets = targets_of(found)
    print_targets(targets)
    record = {**provenance("benchmarks/thin_links.py"), "links": found, "targets": targets}
    write_json(arguments.json, record)


if __name__ == "__main__":
    main()
