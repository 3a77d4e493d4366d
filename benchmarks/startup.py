"""How long it takes until something can be done: `import adashard`, and `adashard up`.

    import    a new Python that imports adashard's optimizer, less one that imports torch
    up        from the start of `adashard up` to the first 200 of /readyz, less a Python that
              imports torch

Processes are taken in turns; figures are medians of seconds on the wall, with files in the page
cache. The first round is thrown away.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from machine import provenance
from targets import print_targets, target, write_json

TORCH = "import torch"
ADASHARD = "import adashard; adashard.Adafactor"
IMPORT_S, UP_S = 0.3, 5.0
LIMIT_S = 60.0
_LOOK_S = 0.01


def python_s(code: str) -> float:
    """Seconds of a new Python that runs this."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)
    return time.perf_counter() - began


def up_s() -> float:
    """Seconds from the start of `adashard up` until the cluster takes work."""
    port, http_port = _free_ports(2)
    options = ["up", "--port", str(port), "--http-port", str(http_port)]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "adashard_server.cli", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{http_port}", trust_env=False) as http:
            while not _is_ready(http):
                if process.poll() is not None or time.perf_counter() - began > LIMIT_S:
                    raise RuntimeError(f"adashard up did not become ready in {LIMIT_S:.0f} s")
                time.sleep(_LOOK_S)
        return time.perf_counter() - began
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def in_rounds(works: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work, round by round, without the first."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(1 + rounds):
        for name, work in works.items():
            spent = work()
            if turn:
                found[name].append(spent)
    return found


def differences(numbers: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' differences."""
    return statistics.median(a - b for a, b in zip(numbers, others, strict=True))


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 rounds")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    works = {
        "import_torch": lambda: python_s(TORCH),
        "import_adashard": lambda: python_s(ADASHARD),
        "up": up_s,
    }
    spent = in_rounds(works, 2 if arguments.quick else arguments.rounds)
    over = {
        name: differences(spent[name], spent["import_torch"]) for name in ("import_adashard", "up")
    }
    targets = [
        target(
            "seconds: import adashard - import torch", IMPORT_S, over["import_adashard"], "lower"
        ),
        target("seconds: adashard up, ready - import torch", UP_S, over["up"], "lower"),
    ]
    medians: dict[str, Any] = {f"{name}_s": statistics.median(one) for name, one in spent.items()}
    print(medians)
    print_targets(targets)
    record = {**provenance("benchmarks/startup.py"), **medians, "seconds": spent}
    write_json(arguments.json, {**record, "targets": targets})


if __name__ == "__main__":
    main()
