"""How a step grows: with workers and shards, and with the bytes of the model.

    members   steps per second of the demo's model with 1, 2 and 4 shards and 1, 2, 4 and 8
              workers: of whole training steps (forward, backward, step), and of the optimizer's
              step alone, which is push, update and pull
    bytes     seconds per byte of a model of 1 MB to 1 GB, in matrices of 1 MB; one shard, one
              worker, the optimizer's step alone

Shards and workers are processes. More of them than the machine has cores share the cores: here
the plot shows what members cost, and not what they are for. Writes one plot of each into `--plots`.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from machine import provenance
from plots import Axis, Point, line_plot, powers
from targets import Target, print_targets, target, write_json
from workers import DEMO, Crew, Shapes

from adashard_server import LocalCluster

SHARDS, WORKERS = (1, 2, 4), (1, 2, 4, 8)
MATRIX = (512, 512)
MATRIX_BYTES = 4 * MATRIX[0] * MATRIX[1]
SIZES = (1, 4, 16, 64, 256, 1024)  # matrices
FROM_SIZE = 16  # below it, what a step costs whatever its bytes shows
LINEAR = 1.5
WARM_UP = 2


def steps_s(
    crew: Crew, workers: int, shapes: Shapes, address: str, job: str, count: int
) -> dict[str, float]:
    """Medians of the seconds of a step, alone and within training; of the latter the demo's."""
    crew.do(workers, "join", shapes, address, job, workers)
    found = {}
    for kind in ("step", "training") if shapes == DEMO else ("step",):
        spent = crew.steps_s(workers, WARM_UP + count, training=kind == "training")
        found[kind] = statistics.median(spent[WARM_UP:])
    crew.do(workers, "leave")
    return found


def measure_members(crew: Crew, count: int) -> list[dict[str, Any]]:
    """Steps per second for each number of shards and of workers."""
    found = []
    for shards in SHARDS:
        with LocalCluster(shards, restart=False) as cluster:
            for workers in WORKERS:
                job = f"demo-{workers}"
                seconds = steps_s(crew, workers, DEMO, cluster.address, job, count)
                row = {f"{kind}s_per_s": 1.0 / one for kind, one in seconds.items()}
                found.append({"shards": shards, "workers": workers, **row})
                print(found[-1], flush=True)
    return found


def measure_bytes(crew: Crew, sizes: tuple[int, ...], count: int) -> list[dict[str, Any]]:
    """Seconds of a step and seconds per byte, for each size of the model."""
    found = []
    for size in sizes:
        with LocalCluster(1, restart=False) as cluster:
            job = f"bytes-{size}"
            steps = count if size >= FROM_SIZE else 4 * count
            seconds = steps_s(crew, 1, [MATRIX] * size, cluster.address, job, steps)["step"]
        weight_bytes = size * MATRIX_BYTES
        row = {"bytes": weight_bytes, "step_s": seconds, "s_per_byte": seconds / weight_bytes}
        found.append(row)
        print(row, flush=True)
    return found


def targets(by_bytes: list[dict[str, Any]]) -> list[Target]:
    """A step is to be linear in bytes: one of the largest model costs what a smaller one's does."""
    rows = [row for row in by_bytes if row["bytes"] >= FROM_SIZE * MATRIX_BYTES]
    first, last = rows[0], rows[-1]
    name = f"seconds per byte: {_megabytes(last['bytes'])} / {_megabytes(first['bytes'])} model"
    return [target(name, LINEAR, last["s_per_byte"] / first["s_per_byte"], "lower")]


def plot_members(rows: list[dict[str, Any]], kind: str, title: str) -> str:
    """Steps per second over workers, a line for each number of shards."""
    lines = {
        f"{shards} shard" + "s" * (shards > 1): [
            (float(row["workers"]), row[kind]) for row in rows if row["shards"] == shards
        ]
        for shards in SHARDS
    }
    speeds = [speed for line in lines.values() for _, speed in line]
    x = Axis(label="workers", ticks=WORKERS)
    y = Axis(label="steps per second", ticks=powers(speeds, 2))
    return line_plot(title, lines, x, y)


def plot_bytes(rows: list[dict[str, Any]]) -> str:
    """Nanoseconds per byte over bytes."""
    points: list[Point] = [(float(row["bytes"]), 1e9 * row["s_per_byte"]) for row in rows]
    sizes, costs = zip(*points, strict=True)
    x = Axis(label="bytes of the model's weights", ticks=powers(sizes, 4), form=_megabytes)
    y = Axis(label="nanoseconds per byte", ticks=powers(costs, 2))
    return line_plot("A step's cost per byte as the model grows", {"1 shard": points}, x, y)


def _megabytes(count: float) -> str:
    return f"{count / (1 << 20):g} MiB"


def write_plots(
    folder: Path, members: list[dict[str, Any]], by_bytes: list[dict[str, Any]]
) -> None:
    """The plots of docs/benchmarks.md."""
    plots = {
        "growth-training": plot_members(
            members, "trainings_per_s", "The demo's training steps per second"
        ),
        "growth-members": plot_members(
            members, "steps_per_s", "Push, update and pull of the demo's model"
        ),
        "growth-bytes": plot_bytes(by_bytes),
    }
    for name, plot in plots.items():
        (folder / f"{name}.svg").write_text(plot)


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="of the demo, that count")
    parser.add_argument("--quick", action="store_true", help="fewer steps, and up to 256 MB")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the plots there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    arguments = parser.parse_args()
    few, sizes = (3, SIZES[:-1]) if arguments.quick else (5, SIZES)
    with Crew(1) as crew:
        by_bytes = measure_bytes(crew, sizes, few)
    with Crew(max(WORKERS)) as crew:
        members = measure_members(crew, few if arguments.quick else arguments.steps)
    found = targets(by_bytes)
    print_targets(found)
    if arguments.plots:
        write_plots(arguments.plots, members, by_bytes)
    record = {**provenance("benchmarks/growth.py"), "members": members, "bytes": by_bytes}
    write_json(arguments.json, {**record, "targets": found})


if __name__ == "__main__":
    main()
