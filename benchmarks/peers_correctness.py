"""Is the result the same on one server as on several? Asked of adashard and of its peers.

    python benchmarks/peers_correctness.py --setup /tmp/peers     # the peers' environments, once
    python benchmarks/peers_correctness.py --venvs /tmp/peers --json peers_correctness.json

Three matrices are trained for five steps on 1, 2 and 4 servers. The number is the largest
difference to the result on one server, over the largest total update there. Ends with 1 unless
every number of adashard is exactly 0; what a peer does never changes the exit code.
docs/benchmarks.md says what was measured, and how to read it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from machine import provenance
from peers import matrices
from peers.environments import ADASHARD, MXNET, PEERS, TENSORFLOW, set_up
from peers.measurement import Laboratory, Measurement, Series, System

SCRIPT = "benchmarks/peers_correctness.py"
SYSTEMS = (
    System(
        name="adashard",
        optimizer="Adafactor",
        environment=ADASHARD,
        module="peers.adashard_cluster",
    ),
    System(
        name="TensorFlow",
        optimizer="Adafactor",
        environment=TENSORFLOW,
        module="peers.tensorflow_ps",
    ),
    *(
        System(
            name="MXNet",
            optimizer=optimizer,
            environment=MXNET,
            module="peers.mxnet_kvstore",
            arguments=("--optimizer", optimizer),
        )
        for optimizer in ("lamb", "lars", "adam")
    ),
)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that every `finally` is reached
    options = _options()
    if options.setup is not None:
        return set_up_peers(options.setup, options.python)
    chosen = [one for one in SYSTEMS if options.only in (None, one.environment.name)]
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(matrices.trainings(), options.venvs, Path(folder))
        series = [laboratory.measure(system) for system in chosen]
        agreement = adafactors_agree(laboratory, series)
        versions = {
            environment.name: laboratory.versions(environment)
            for environment in dict.fromkeys(system.environment for system in chosen)
        }
    measurements = [one for each in series for one in each.measurements]
    print(table(measurements))
    if agreement is not None:
        print(f"\nTensorFlow on one server, against adashard on one: {number(agreement)}")
    if options.json is not None:
        results = [asdict(one) for one in measurements]
        record = {**provenance(SCRIPT), "versions": versions}
        record |= {"tensorflow_to_adashard_on_one_server": agreement, "results": results}
        options.json.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    return verdict(measurements)


def set_up_peers(folder: Path, python: str) -> int:
    """Makes every peer's environment; one that fails is told and does not stop the others."""
    failed = []
    for environment in PEERS:
        try:
            set_up(environment, folder, python)
        except subprocess.CalledProcessError as error:
            failed.append(environment.name)
            print(f"{environment.name}: {error}", file=sys.stderr)
    return 1 if failed else 0


def adafactors_agree(laboratory: Laboratory, series: Sequence[Series]) -> float | None:
    """Largest relative distance between the two Adafactors on one server, over all matrices.

    Small only if both are the same algorithm with the same settings: then what TensorFlow shows on
    several servers comes from the cut, and not from another reading of the paper.
    """
    by_environment = {each.system.environment.name: each.one_server for each in series}
    ours, theirs = by_environment.get(ADASHARD.name), by_environment.get(TENSORFLOW.name)
    if ours is None or theirs is None:
        return None
    distances = [laboratory.distance(name, theirs[name], ours[name]) for name in ours]
    return max(difference / update for difference, update in distances)


def table(measurements: Sequence[Measurement]) -> str:
    """All numbers, as Markdown: a line for each system and number of servers."""
    trainings = list(dict.fromkeys(one.training for one in measurements))
    lines = [["system", "optimizer", "servers", *trainings]]
    for (system, optimizer, servers), group in groupby(
        measurements, key=lambda one: (one.system, one.optimizer, one.servers)
    ):
        lines.append([system, optimizer, str(servers), *(_cell(one) for one in group)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def number(relative: float) -> str:
    """Three digits; an exact zero is a bare 0, and nothing else is."""
    return "0" if relative == 0.0 else f"{relative:.3g}"


def verdict(measurements: Sequence[Measurement]) -> int:
    """The exit code; says what is wrong where adashard is not exact."""
    wrong = [one for one in measurements if one.system == "adashard" and one.relative != 0.0]
    for one in wrong:
        fault = one.reason or f"difference {one.difference}"
        print(
            f"adashard, servers: {one.servers}, {one.training}: {one.status}, {fault}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def _cell(measurement: Measurement) -> str:
    if measurement.relative is None:
        return measurement.status
    return number(measurement.relative)


def _options() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, metavar="DIR", help="where --setup has been")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--only", choices=list({one.environment.name: None for one in SYSTEMS}))
    parser.add_argument(
        "--setup", type=Path, metavar="DIR", help="make the peers' environments there, and end"
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="interpreter for --setup; mxnet needs 3.11 or older (default: this one)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
