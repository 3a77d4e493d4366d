"""A whole cluster in virtual time: its course, and what must hold after every event."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

from tests.sim.clockwork import Loop, Process
from tests.sim.coordinator import SimCoordinator, SimRegistry
from tests.sim.disk import Disk
from tests.sim.faults import FAMILIES, Faults, Script
from tests.sim.history import Violation
from tests.sim.member import Member
from tests.sim.network import Network, Stream
from tests.sim.promises import Promises
from tests.sim.shard import SimShard
from tests.sim.truth import Truth
from tests.sim.worker import SimWorker

from adashard.wire.errors import AdashardError
from adashard.wire.messages import Entry, Run
from adashard.wire.placement import SLICE_BYTES_MIN, cut
from adashard.wire.spec import AdafactorLayout, DType, EpsPlacement, Group, JobSpec, Parameter
from adashard_server.cluster.leases import LeaseSettings
from adashard_server.shard.instructions import Degraded

LEASES = LeaseSettings(lease_s=4.0, grace_s=1.5, renew_s=0.5, replace_after_s=2.0)
PATIENCE_S = 60.0  # after the last fault, within which every worker takes its steps
STEPS_AFTER = 3
SHAPES = [(1,), (2,), (3,), (1,), (2,), (3,), (12, 2), (2, 17), (40,)]  # the last are split
EPS_PLACEMENTS = [EpsPlacement.ADDED, EpsPlacement.CLAMPED]


def job_of(rng: random.Random) -> JobSpec:
    """A small job; of some parameters there are two slices or four."""
    return JobSpec(
        parameters=tuple(
            Parameter(name=f"parameter-{n}", shape=rng.choice(SHAPES))
            for n in range(rng.randint(1, 4))
        ),
        groups=(Group(adafactor=AdafactorLayout(eps_placement=rng.choice(EPS_PLACEMENTS))),),
        slice_bytes=SLICE_BYTES_MIN,
        min_workers=rng.randint(1, 2),
    )


class Cluster:
    """Coordinators, shards and workers that come, leave and are killed.

    Everything follows from the arguments: a run that fails fails again, with the same events.

    Args:
        seed: of everything that is left to chance.
        family: which faults there are; one of `FAMILIES` where it is not said.
        script: faults of an earlier run, to be repeated instead of drawing others.
        traced: whether `lines` tell what happened.
    """

    job = "job"
    leases = LEASES

    def __init__(
        self,
        seed: int,
        *,
        family: str | None = None,
        script: Script | None = None,
        traced: bool = False,
    ) -> None:
        self.loop = Loop(seed)
        rng = self.loop.rng
        weights = [one.weight for one in FAMILIES.values()]
        (drawn,) = rng.choices(list(FAMILIES), weights)
        self.family = family or drawn
        kind = FAMILIES[self.family]
        self.seed, self.kind = seed, kind
        self.lines: list[str] | None = [] if traced else None
        self.spec = job_of(rng)
        self.truth = Truth(cut(self.spec))
        self.windows: Counter[str] = Counter()
        self.changed = False  # whether somebody holds something new
        self.lost = False
        self.network = Network(self.loop, rough=kind.rough)
        self.clock = Process(self.loop, "clock")
        self.registry = SimRegistry(self)
        self.shard_count = rng.randint(1, 3)
        self.apply_s = rng.choice([0.0, 0.03, 0.2])  # what a slice's step takes, now and then
        self.durable = rng.random() < 0.5 if kind.durable is None else kind.durable
        self.disk = Disk(self, every_steps=rng.choice(kind.every_steps))
        self.coordinators: list[SimCoordinator] = []
        self.shards: dict[str, SimShard] = {}
        self.workers: list[SimWorker] = []
        self.promises = Promises(self)
        self._target: int | None = None
        self._open = 0
        self.faults = Faults(self, seed, kind, script)
        self.begin_coordinator()
        for _ in range(self.shard_count):
            self.begin_shard()
        for _ in range(rng.randint(self.spec.min_workers, 3)):
            self.begin_worker()

    # --- the course of things -------------------------------------------------------------------

    def run(self) -> None:
        """Runs to the end.

        Raises:
            Violation: a promise is broken.
        """
        loop, faults = self.loop, self.faults
        while not self.lost:
            loop.next()
            if self._target is None:
                faults.after_event()
                if loop.now > faults.until_s:
                    self._heal()
            elif self._finished():
                break
            elif loop.now > faults.until_s + PATIENCE_S:
                raise Violation(self._stuck())
            if self.changed:
                self.changed = False
                self.promises.copies()
        if not self.lost:
            self.promises.rest()

    def trace(self, text: str, *facts: object) -> None:
        if self.lines is not None:
            self.lines.append(f"{self.loop.now:8.4f}  {text % facts}")

    def saw(self, window: str) -> None:
        """A rare moment has been reached."""
        self.windows[window] += 1

    def reached(self, what: str, process: Process) -> None:
        """A moment in which it matters what happens next."""
        if self._target is None:
            self.faults.reached(process)

    def resting(self, worker: SimWorker) -> bool:
        """Whether the worker has taken all its steps."""
        return self._target is not None and worker.worker.version >= self._target

    def runs(self, index: int, start: int = 0) -> Iterator[Run]:
        """A slice in pieces, other ones each time."""
        count, rng = self.truth.slices[index].element_count, self.loop.rng
        while start < count:
            step = rng.randint(1 + (count - start) // 2, count - start)
            yield Run(slice=index, start=start, count=step, dtype=DType.FLOAT32)
            start += step

    def _heal(self) -> None:
        """Faults are over: whoever lives takes some more steps, and who is needed comes back."""
        self.faults.healed()
        self.network.heal()
        if not self.live_coordinators():
            self.begin_coordinator()
        if self.registry.newest is None:  # two that never write would never hear of each other
            for coordinator in self.live_coordinators()[:-1]:
                coordinator.kill()
        while len(self.live_shards()) < (1 if self._open else self.shard_count):
            self.begin_shard()
        while sum(one.leave_at is None for one in self.live_workers()) < self.spec.min_workers:
            self.begin_worker()
        shards = [shard.rounds.version for shard in self.live_shards()]
        workers = [worker.worker.version for worker in self.live_workers()]
        self._target = max(0, *shards, *workers) + STEPS_AFTER
        self.trace("HEALED, target %d", self._target)

    def _finished(self) -> bool:
        return all(self.resting(one) for one in self.live_workers() if one.leave_at is None)

    def _stuck(self) -> str:
        workers = [
            f"{one.name} at {one.worker.version} of generation {one.worker.promised}"
            f"{'' if one.worker.plan else ' (frozen)'}"
            for one in self.live_workers()
        ]
        shards = [f"{one.name} at {one.rounds.version}" for one in self.live_shards()]
        return f"nobody goes on to step {self._target}: {', '.join(workers + shards)}"

    # --- who is there ---------------------------------------------------------------------------

    def begin_coordinator(self) -> None:
        """One begins, unless there is one."""
        if not self.live_coordinators():
            self.begin_second_coordinator()

    def begin_second_coordinator(self) -> None:
        name = f"coordinator-{len(self.coordinators):03}"
        self.trace("%s begins", name)
        self.coordinators.append(SimCoordinator(name, self, self.registry))

    def begin_shard(self) -> None:
        name = f"shard-{len(self.shards):03}"
        self.trace("%s begins, empty", name)
        self.shards[name] = SimShard(name, self)

    def begin_worker(self, *, leave_after: int | None = None) -> None:
        name = f"worker-{len(self.workers):03}"
        self.trace("%s begins, leaves at %s", name, leave_after)
        self.workers.append(SimWorker(name, self, leave_at=leave_after))

    def let_leave(self, name: str) -> None:
        worker = next(worker for worker in self.workers if worker.name == name)
        worker.leave_at = max(0, worker.worker.version)

    def swap_weights(self, name: str) -> None:
        """User code puts other weights into a model for a while, as averages of them."""
        worker = next(worker for worker in self.workers if worker.name == name)
        worker.evaluates = True

    def live_workers(self) -> list[SimWorker]:
        return [worker for worker in self.workers if worker.alive]

    def live_shards(self) -> list[SimShard]:
        return [shard for shard in self.shards.values() if shard.alive]

    def live_coordinators(self) -> list[SimCoordinator]:
        return [one for one in self.coordinators if one.alive]

    def members(self) -> list[Member]:
        return [*self.live_shards(), *self.live_workers()]

    def processes(self) -> list[Process]:
        return [*self.live_coordinators(), *self.members()]

    def is_member(self, name: str) -> bool:
        """Whether the newest generation in the registry has it."""
        entry = self.registry.newest
        return entry is not None and name in {one.id for one in (*entry.workers, *entry.shards)}

    # --- streams --------------------------------------------------------------------------------

    def front(self) -> SimCoordinator | None:
        """The coordinator that a new stream comes to: the newest, or now and then another."""
        living = self.live_coordinators()
        if len(living) > 1 and self._target is None and self.loop.rng.random() < 0.3:
            return living[0]
        return living[-1] if living else None

    def serve(self, stream: Stream) -> None:
        """A control stream has begun."""
        server = stream.server
        assert isinstance(server, SimCoordinator)
        server.start(server.serve(stream))

    def data_streams(self) -> list[Stream]:
        return [one for one in self.network.streams if isinstance(one.server, SimShard)]

    def break_control(self, name: str) -> None:
        for stream in [*self.network.streams]:
            if stream.caller.name == name and isinstance(stream.server, SimCoordinator):
                stream.cut()

    # --- what is told ---------------------------------------------------------------------------

    def announced(self, coordinator: SimCoordinator, name: str, text: str) -> None:
        """A coordinator tells people something."""
        self.trace("EVENT %s: %s", name, text)
        if name == "open":
            entry = coordinator.coordinator.jobs[self.job].entry
            self._open = entry.generation
            self.promises.opened(entry)
        if name in ("lost", "restored"):
            self.lost = name == "lost"
            self.promises.lost(text, wholly=self.lost)
            self.saw(f"a job is {name}")

    def begins_anew(self, entry: Entry) -> None:
        """A coordinator has found nothing in its memory, and begins or goes on with a job."""
        if entry.lineage is None or entry.lineage.number != entry.generation:
            self.saw("a job is taken over from its members")
            return
        self.promises.forgotten()
        self.saw("a job is forgotten")
        self.truth.clear()
        self.disk.clear()
        self.promises = Promises(self)
        self._open = 0

    def opened(self, generation: int = 1) -> bool:
        """Whether a generation was opened, this or a later one."""
        return self._open >= generation

    def steps_down(self, coordinator: SimCoordinator, reason: str) -> None:
        """A coordinator ends; whoever watches over it begins another."""
        self.trace("%s steps down: %s", coordinator.name, reason)
        if len(self.coordinators) == 1:
            raise Violation(f"the only coordinator steps down: {reason}")
        self.saw("a coordinator steps down")
        coordinator.kill()
        self.clock.after(0.5, self.begin_coordinator)

    def degraded(self, shard: SimShard, told: Degraded) -> None:
        """A shard finishes a step without a worker that has gone."""
        self.trace("EVENT degraded on %s: %s", shard.name, told)
        self.saw("a degraded step")
        self.promises.degraded(told)

    def ended(self, worker: SimWorker, error: AdashardError) -> None:
        """A worker's session ends with an error."""
        self.trace("%s ends: %s", worker.name, error)
        self.promises.ended(worker, error)
        self.saw("a worker is told that it was left out")
        if len(self.live_workers()) <= self.spec.min_workers:
            self.clock.after(0.5, self.begin_worker)  # as it does whose job needs it
