"""Runs the simulator over many seeds: `python -m tests.sim --seeds 100000`.

Seeds are spread over processes. It ends with the first that fails, and tells its shortest script;
otherwise with counts of seeds, events, and rare moments that were reached.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from tests.sim.cluster import Cluster
from tests.sim.faults import FAMILIES
from tests.sim.shrinking import failure, story

BLOCK = 100


@dataclass
class Tally:
    """What came of a block of seeds."""

    seeds: int = 0
    events: int = 0
    windows: Counter[str] = field(default_factory=Counter)
    families: Counter[str] = field(default_factory=Counter)
    failed: list[int] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.seeds += other.seeds
        self.events += other.events
        self.windows += other.windows
        self.families += other.families
        self.failed += other.failed

    def lines(self) -> Iterator[str]:
        yield f"{self.seeds:,} seeds, {self.events:,} events, {len(self.failed)} failed"
        for name, count in sorted(self.families.items()):
            yield f"{count:>12,}  seeds of family {name}"
        for name, count in self.windows.most_common():
            yield f"{count:>12,}  {name}"


def tally(seeds: range, family: str | None) -> Tally:
    """Runs seeds in this process."""
    total = Tally()
    for seed in seeds:
        cluster = Cluster(seed, family=family)
        error = failure(cluster)
        total.add(Tally(1, cluster.loop.events, cluster.windows, Counter([cluster.family])))
        if error is not None:
            total.failed.append(seed)
    return total


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--family", choices=sorted(FAMILIES), default=None)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--failures", type=int, default=1, help="after which it ends")
    given = parser.parse_args(arguments)
    began, total = time.monotonic(), Tally()
    stop = given.start + given.seeds
    blocks = [range(at, min(at + BLOCK, stop)) for at in range(given.start, stop, BLOCK)]
    with ProcessPoolExecutor(given.processes) as pool:
        for found in pool.map(tally, blocks, [given.family] * len(blocks)):
            total.add(found)
            if len(total.failed) >= given.failures:
                pool.shutdown(cancel_futures=True)
                break
    print("\n".join(total.lines()))
    print(f"{time.monotonic() - began:.0f} s in {given.processes} processes")
    for seed in total.failed[:1]:
        print(story(seed, given.family))
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
