"""A training that goes on for minutes while its processes are killed at random.

    python benchmarks/soak.py --minutes 10
    python benchmarks/soak.py --minutes 2 --seed 7 --json soak.json

Two workers train through two shards and a coordinator. Every ten seconds a shard, the coordinator
or, now and then, a worker is killed; servers are brought back by the launcher, a worker is replaced
by a new one. Nothing may hang: a step that takes over 30 s is a hang. Both workers must come to the
same bits all the time. And memory must stay flat: after the first minute shard 0 and worker 0 are
spared, and at the end each holds within 5 % of what it held after the second minute.

Ends with 1 if any of this does not hold.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disturbed.crew import Crew, Failed
from disturbed.stage import cluster
from machine import provenance

from adashard_server import LocalCluster

JOB = "soak"
WORKERS = 2
VICTIMS = ("shard-0", "shard-1", "coordinator") * 3 + ("worker-0", "worker-1")
SPARED = ("shard-0", "worker-0")
SPARED_FROM_S = 60.0
MEASURED_FROM_S = 120.0
HANG_S = 30.0
STEPS_PER_ORDER = 50
FLAT = 0.05
_LOOK_S = 0.02
_END_S = 60.0


@dataclass
class Diary:
    """What has happened so far.

    Attributes:
        steps: that the first worker has seen the end of.
        killed: how often, by name.
        longest_s: the longest time from a worker's step to its next.
        hangs: waits of over `HANG_S`.
        digests: by step, those that workers have come to.
        errors: what a worker has raised.
        memory: bytes by name, after the second minute and now, of one and the same process.
    """

    steps: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    hangs: int = 0
    digests: dict[int, set[str]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def compared(self) -> int:
        """Times that workers have come to the same bits."""
        return sum(len(found) == 1 for found in self.digests.values())

    def growth(self, name: str) -> float:
        """What a process holds more at the end, as a part of what it held before."""
        before, after = self.memory[name]
        return after / before - 1.0

    def faults(self) -> list[str]:
        """What should not be."""
        found = [f"{self.hangs} hangs"] if self.hangs else []
        found += self.errors
        found += [f"two results of step {n}" for n, one in self.digests.items() if len(one) > 1]
        for name in self.memory:
            if abs(self.growth(name)) > FLAT:
                found.append(f"{name} holds {self.growth(name):+.1%}")
        return found


class Soak:
    """A cluster and a crew that are kept at work, and disturbed."""

    def __init__(self, cluster: LocalCluster, crew: Crew, diary: Diary, seed: int) -> None:
        self._cluster, self._crew, self._diary = cluster, crew, diary
        self._random = random.Random(seed)
        self._heard_s = [0.0] * WORKERS
        self._ending = False
        self._left = 0

    def run(self, minutes: float, interval_s: float) -> None:
        """Trains for so long, with a kill every `interval_s`."""
        for index in range(WORKERS):
            self._begin(index)
        began_s = time.monotonic()
        kill_s, end_s = began_s + interval_s, began_s + 60.0 * minutes
        while (now_s := time.monotonic()) < end_s and not self._diary.errors:
            self._listen(now_s)
            self._measure(now_s - began_s)
            if now_s >= kill_s:
                kill_s += interval_s
                self._kill(now_s - began_s)
            time.sleep(_LOOK_S)
        self._finish()

    def _begin(self, index: int) -> None:
        trainee = self._crew.trainees[index].wait_ready()
        self._heard_s[index] = time.monotonic()
        trainee.tell("join", address=self._cluster.address, job=JOB, index=index, workers=1)
        trainee.tell("train", until=_next_order(self._diary.steps))

    def _listen(self, now_s: float) -> None:
        """Hears all workers, and gives those that have done an order the next."""
        for index, trainee in enumerate(self._crew.trainees):
            try:
                for said in trainee.heard():
                    self._note(index, said)
            except Failed as error:
                self._diary.errors.append(f"worker-{index}: {error}")
            if now_s - self._heard_s[index] > HANG_S:
                self._heard_s[index] = now_s
                self._diary.hangs += 1
                print(f"worker-{index} hangs at step {self._diary.steps}", flush=True)

    def _note(self, index: int, said: dict[str, Any]) -> None:
        """Takes down what a worker says, and tells it what to do next if it is done."""
        diary, trainee = self._diary, self._crew.trainees[index]
        if "step" in said:
            diary.longest_s = max(diary.longest_s, said["ended_s"] - self._heard_s[index])
            diary.steps = max(diary.steps, said["step"])
            self._heard_s[index] = said["ended_s"]
        elif "digest" in said:
            diary.digests.setdefault(said["at"], set()).add(said["digest"])
            if self._ending:
                trainee.tell("leave")
            else:
                trainee.tell("train", until=_next_order(said["at"]))
        else:
            self._left += 1

    def _kill(self, elapsed_s: float) -> None:
        spared = SPARED if elapsed_s >= SPARED_FROM_S else ()
        name = self._random.choice([one for one in VICTIMS if one not in spared])
        self._diary.killed[name] += 1
        print(f"{elapsed_s:5.0f} s, step {self._diary.steps}: {name} is killed", flush=True)
        role, _, index = name.partition("-")
        if role == "worker":
            self._crew.replace(int(index))
            self._begin(int(index))
        elif self._cluster.processes[name].exit_code is None:  # else it is on its way back
            self._cluster.processes[name].kill()

    def _measure(self, elapsed_s: float) -> None:
        """Notes what the spared hold, from the second minute on."""
        if elapsed_s < MEASURED_FROM_S:
            return
        pids = {name: one.pid for name, one in self._cluster.processes.items()}
        pids |= {f"worker-{n}": one.pid for n, one in enumerate(self._crew.trainees)}
        pids["launcher"] = os.getpid()
        for name in (*SPARED, "launcher"):
            held = _held_bytes(pids[name])
            first, _ = self._diary.memory.get(name, (held, 0))
            self._diary.memory[name] = first, held

    def _finish(self) -> None:
        """Lets the workers come to the end of their orders, and leave."""
        self._ending, deadline_s = True, time.monotonic() + _END_S
        while self._left < WORKERS and not self._diary.errors:
            now_s = time.monotonic()
            if now_s > deadline_s:
                self._diary.errors.append("the workers did not come to an end")
            self._listen(now_s)
            time.sleep(_LOOK_S)


def _next_order(step: int) -> int:
    """The step after `step` at which workers compare their bits."""
    return (step // STEPS_PER_ORDER + 1) * STEPS_PER_ORDER


def _held_bytes(pid: int) -> int:
    """Memory of a process that is in the machine's (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def describe(diary: Diary) -> str:
    """The summary, a line for each thing."""
    kills = ", ".join(f"{name} {count}" for name, count in sorted(diary.killed.items()))
    lines = [
        f"steps: {diary.steps}; the same bits {diary.compared} times",
        f"kills: {sum(diary.killed.values())} ({kills})",
        f"hangs: {diary.hangs}; longest step: {diary.longest_s:.1f} s",
    ]
    lines += [
        f"memory of {name}: {before / 1e6:.0f} MB after two minutes, {after / 1e6:.0f} MB at the "
        f"end ({diary.growth(name):+.1%})"
        for name, (before, after) in diary.memory.items()
    ]
    return "\n".join([*lines, *(f"WRONG: {fault}" for fault in diary.faults())])


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    parser.add_argument("--interval-s", type=float, default=10.0, help="between two kills (10)")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed (0)")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args()
    diary, crew = Diary(), Crew(WORKERS, {})
    try:
        with cluster() as running:
            Soak(running, crew, diary, arguments.seed).run(arguments.minutes, arguments.interval_s)
    finally:
        crew.stop()
    print(describe(diary))
    if arguments.json:
        found = {
            **provenance("benchmarks/soak.py"),
            "steps": diary.steps,
            "killed": dict(diary.killed),
            "hangs": diary.hangs,
            "longest_s": diary.longest_s,
            "memory_bytes": diary.memory,
            "wrong": diary.faults(),
        }
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(diary.faults()))


if __name__ == "__main__":
    main()
