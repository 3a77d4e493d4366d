"""What goes wrong in a run: drawn from a seed, or read from a script that a run has left.

A fault says when, what, to whom, and one number that settles the rest (how long, whether it comes
back), so that any part of a script is a script.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tests.sim.clockwork import Process

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

KILL, PAUSE, PART = "kill", "pause", "part"
KILL_SHARDS, POWER_LOSS = "kill all shards", "power loss"
JOIN, LEAVE, ADD_SHARD = "join", "leave", "add a shard"
BREAK_CONTROL, BREAK_DATA, LOSE_ANSWERS = "break control", "break data", "lose answers"
HEAL = "heal"  # no fault, but the end of them
SECOND, SEVER, SWAP_WEIGHTS = "second coordinator", "sever", "swap weights"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, right after the first event at `at_s` or later."""

    at_s: float
    kind: str
    target: str = ""
    value: float = 0.0

    def __str__(self) -> str:
        return f"{self.at_s:9.4f} s  {self.kind} {self.target} ({self.value:.3f})"


Script = tuple[Fault, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Which faults go together.

    Attributes:
        kinds: how often each happens, in proportion.
        roles: of processes that are killed or paused, by how their names begin.
        most: as many faults as a run may have.
        rough: whether the network loses, doubles and delays.
        durable: whether the registry outlives the coordinator; None for either.
        leaves: whether workers may be told to leave by themselves.
        every_steps: there is a checkpoint, 0 for never; a run has one of these.
        stored: whether faults wait for the first checkpoint, and not for the first step.
        keeps: promises that nothing is lost and no step degraded.
        often: how often, against other families.
        weight: how many of all seeds are of this family, in proportion.
    """

    kinds: Mapping[str, int]
    roles: tuple[str, ...] = ("worker", "shard", "coordinator")
    most: int = 8
    rough: bool = True
    durable: bool | None = None
    leaves: bool = True
    every_steps: tuple[int, ...] = (0, 0, 1, 3)
    stored: bool = False
    keeps: bool = False
    often: float = 1.0
    weight: int = 2

    @property
    def parts(self) -> bool:
        """Whether members may be silent although they live."""
        silent = PAUSE in self.kinds and self.roles != ("coordinator",)
        return silent or not self.kinds.keys().isdisjoint((PART, SEVER))


FAMILIES: dict[str, Family] = {
    "calm": Family(kinds={}, weight=1, most=0, rough=False, keeps=True, durable=True),
    "joins": Family(kinds={JOIN: 2, LEAVE: 1}, most=5, rough=False, keeps=True, durable=True),
    "network": Family(
        kinds={BREAK_CONTROL: 2, BREAK_DATA: 4, LOSE_ANSWERS: 2, JOIN: 1, LEAVE: 1}, durable=True
    ),
    "workers": Family(kinds={KILL: 3, JOIN: 2, LEAVE: 1}, roles=("worker",), durable=True),
    "shards": Family(
        kinds={KILL: 5, KILL_SHARDS: 1, ADD_SHARD: 1, JOIN: 2},
        roles=("shard",),
        leaves=False,
        keeps=True,
        durable=True,
        weight=5,
    ),
    "coordinators": Family(
        kinds={KILL: 2, SECOND: 3, PAUSE: 1, JOIN: 2}, roles=("coordinator",), most=12, often=3
    ),
    "pauses": Family(
        kinds={PAUSE: 4, JOIN: 1, LEAVE: 1}, roles=("worker", "shard"), durable=True, often=2
    ),
    "partitions": Family(kinds={PART: 4, JOIN: 1, LEAVE: 1}, durable=True, often=2),
    "links": Family(kinds={SEVER: 1}, most=2, durable=True),
    "swaps": Family(
        kinds={KILL: 2, KILL_SHARDS: 1, SWAP_WEIGHTS: 3}, roles=("shard",), leaves=False, often=2
    ),
    "disasters": Family(
        kinds={POWER_LOSS: 3, KILL: 2, KILL_SHARDS: 1, JOIN: 1},
        most=4,
        durable=True,
        every_steps=(1, 3),
        stored=True,
        weight=3,
        often=0.5,
    ),
    "kills": Family(kinds={KILL: 8, KILL_SHARDS: 1, JOIN: 3, LEAVE: 1, ADD_SHARD: 1}, weight=5),
    "storm": Family(
        kinds={
            KILL: 8,
            KILL_SHARDS: 1,
            JOIN: 4,
            LEAVE: 1,
            ADD_SHARD: 1,
            PAUSE: 2,
            PART: 2,
            BREAK_CONTROL: 1,
            BREAK_DATA: 2,
            LOSE_ANSWERS: 1,
            SECOND: 1,
            SWAP_WEIGHTS: 1,
        },
        most=20,
        weight=5,
    ),
}


class Faults:
    """Lets things go wrong in one cluster, and remembers what it did.

    Args:
        cluster: what it happens to.
        seed: what is drawn from, where there is no script.
        family: which faults there are.
        script: of an earlier run, whole or in part; nothing else goes wrong then.
    """

    def __init__(
        self, cluster: Cluster, seed: int, family: Family, script: Script | None = None
    ) -> None:
        self.done: list[Fault] = []
        self._cluster, self._family = cluster, family
        self._rng = rng = random.Random(f"faults of {seed}")
        self._left = rng.randint(min(1, family.most), family.most) if script is None else 0
        self._chance = rng.choice([0.002, 0.005, 0.01]) * family.often
        self._aimed = rng.choice([0.02, 0.05, 0.15])
        ends = [fault.at_s for fault in script or () if fault.kind == HEAL]
        self.until_s = rng.uniform(1.0, 4.0) if family.most else 1.0
        self._waits = rng.random() < 0.8  # for what may be lost
        if ends:
            self.until_s = math.nextafter(ends[0], 0.0)
        for fault in script or ():
            if fault.kind != HEAL:
                cluster.loop.at(fault.at_s, cluster.clock, partial(self._do, fault))

    def after_event(self) -> None:
        """Perhaps something happens that nobody expects."""
        if self._left > 0 and self._rng.random() < self._chance:
            self._expect(None, 0.0)

    def reached(self, process: Process) -> None:
        """A moment that matters: perhaps something happens to the process right after it."""
        if self._left > 0 and self._rng.random() < self._aimed:
            self._expect(process, self._rng.choice([0.0, 0.0, self._rng.uniform(0.0, 0.03)]))

    # --- what is drawn --------------------------------------------------------------------------

    def _expect(self, process: Process | None, delay_s: float) -> None:
        """Has a fault happen between this event and the next, or a little later."""
        loop, clock = self._cluster.loop, self._cluster.clock
        begun = self._cluster.disk.count if self._family.stored else self._cluster.opened()
        if self._waits and not begun:
            return
        time_s = math.nextafter(loop.now + delay_s, math.inf)
        if time_s < self.until_s:
            self._left -= 1
            loop.at(time_s, clock, lambda: self._draw(process))
            if self._left == 0:
                self.until_s = min(self.until_s, time_s + self._rng.uniform(0.0, 0.5))

    def healed(self) -> None:
        """Faults have ended; where a script says when, that is when."""
        self.done.append(Fault(self._cluster.loop.now, HEAL))

    def _draw(self, process: Process | None) -> None:
        rng, cluster = self._rng, self._cluster
        kind = rng.choices(*zip(*self._family.kinds.items(), strict=True))[0]
        target = self._target(kind, process)
        if target is not None:
            fault = Fault(cluster.loop.now, kind, target, rng.random())
            self._do(fault)

    def _target(self, kind: str, aimed_at: Process | None) -> str | None:
        rng, cluster = self._rng, self._cluster
        living = [one for one in cluster.processes() if one.name.startswith(self._family.roles)]
        if kind in (KILL, PAUSE):
            if aimed_at in living and rng.random() < 0.6:
                return aimed_at.name
            return rng.choice(living).name if living else None
        if kind == PART:
            both = rng.sample([*cluster.processes(), cluster.registry], 2)
            return " ".join(sorted(one.name for one in both))
        if kind == BREAK_CONTROL:
            return rng.choice(cluster.members()).name if cluster.members() else None
        if kind in (BREAK_DATA, LOSE_ANSWERS):
            streams = [f"{s.caller.name} {s.server.name}" for s in cluster.data_streams()]
            return rng.choice(streams) if streams else None
        if kind == SEVER:
            shards, members = cluster.live_shards(), cluster.members()
            both = {rng.choice(shards).name, rng.choice(members).name} if shards else set()
            return " ".join(sorted(both)) if len(both) == 2 else None
        if kind in (LEAVE, SWAP_WEIGHTS):
            workers = cluster.live_workers()
            return rng.choice(workers).name if workers else None
        return ""

    # --- what happens ---------------------------------------------------------------------------

    def _do(self, fault: Fault) -> None:
        self.done.append(fault)
        cluster = self._cluster
        cluster.trace("FAULT %s", fault)
        living = {one.name: one for one in cluster.processes()}
        match fault.kind:
            case "kill" if fault.target in living:
                self._kill(living[fault.target], fault.value)
            case "kill all shards":
                for name in [name for name in living if name.startswith("shard")]:
                    self._kill(living[name], fault.value)
            case "power loss":
                for process in living.values():
                    self._kill(process, fault.value / 2)
            case "pause" if fault.target in living:
                duration_s = cluster.leases.lease_s * (0.05 + 1.6 * fault.value)
                living[fault.target].pause(duration_s)
            case "part":
                self._part(fault, cluster.leases.lease_s * (0.05 + 2.0 * fault.value**2))
            case "sever":
                self._part(fault, math.inf)
            case "swap weights" if fault.target in living:
                cluster.swap_weights(fault.target)
            case "break control" if fault.target in living:
                cluster.break_control(fault.target)
            case "break data" | "lose answers":
                self._break_data(fault)
            case "join":
                leaves = self._family.leaves and fault.value < 0.3
                cluster.begin_worker(leave_after=int(fault.value * 20) if leaves else None)
            case "leave" if fault.target in living:
                cluster.let_leave(fault.target)
            case "add a shard":
                cluster.begin_shard()
            case "second coordinator" if cluster.durable:
                cluster.begin_second_coordinator()

    def _kill(self, process: Process, value: float) -> None:
        """Kills; three of four shards and one of two workers come back, as somebody new."""
        back_s = 0.05 + 2.0 * value
        cluster = self._cluster
        process.kill()
        if process.name.startswith("coordinator"):
            cluster.clock.after(back_s, cluster.begin_coordinator)
        elif process.name.startswith("shard") and value < 0.75:
            cluster.clock.after(back_s, cluster.begin_shard)
        elif process.name.startswith("worker") and value < 0.5:
            cluster.clock.after(back_s, cluster.begin_worker)

    def _part(self, fault: Fault, duration_s: float) -> None:
        cluster = self._cluster
        known = {one.name: one for one in [*cluster.processes(), cluster.registry]}
        ends = [known[name] for name in fault.target.split() if name in known]
        if len(ends) == 2:
            cluster.network.part(ends[0], ends[1], cluster.loop.now + duration_s)

    def _break_data(self, fault: Fault) -> None:
        for stream in self._cluster.data_streams():
            if f"{stream.caller.name} {stream.server.name}" == fault.target:
                stream.cut() if fault.kind == BREAK_DATA else stream.lose_answers()
                return
