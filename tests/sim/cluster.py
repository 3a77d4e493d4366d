"""A whole cluster in virtual time: its faults, and what must hold after every event."""

from __future__ import annotations

from collections.abc import Iterator

from tests.sim.clockwork import Loop, Process, Stream
from tests.sim.coordinator import SimCoordinator
from tests.sim.history import Gradient, History, Violation
from tests.sim.shard import SimShard
from tests.sim.worker import SimWorker

from adashard.wire.control import Bye, FromCoordinator
from adashard.wire.messages import Entry, ExchangeRequest, Run
from adashard.wire.placement import SLICE_BYTES_MIN, cut
from adashard.wire.spec import AdafactorLayout, DType, EpsPlacement, Group, JobSpec, Parameter

FAULTS_S = 6.0  # of virtual time; then the network is kind and nobody is killed
PATIENCE_S = 60.0  # within which every worker then takes its steps
STEPS_AFTER = 3
SHAPES = [(1,), (2,), (3,), (1,), (2,), (3,), (12, 2), (2, 17), (40,)]  # the last are split
EPS_PLACEMENTS = [EpsPlacement.ADDED, EpsPlacement.CLAMPED]


class Cluster:
    """One coordinator, shards that live, and workers that come, leave and are killed.

    Everything follows from the seed: a failing one fails again, with the same events.
    """

    job = "job"

    def __init__(self, seed: int, *, traced: bool = False) -> None:
        self.seed = seed
        self.lines: list[str] | None = [] if traced else None
        self.loop = loop = Loop(seed)
        self._rng = rng = loop.rng
        self.gradients: dict[tuple[str, int], Gradient] = {}
        self.shard_count = rng.randint(1, 3)
        self.spec = JobSpec(
            parameters=tuple(
                Parameter(name=f"parameter-{n}", shape=rng.choice(SHAPES))
                for n in range(rng.randint(1, 4))
            ),
            groups=(Group(adafactor=AdafactorLayout(eps_placement=rng.choice(EPS_PLACEMENTS))),),
            slice_bytes=SLICE_BYTES_MIN,
            min_workers=rng.randint(1, 2),
        )
        self._slices = cut(self.spec)
        self._truth: dict[tuple[str, int], History] = {}
        self._last: History | None = None  # looked at last
        self._orders: dict[int, tuple[str, ...]] = {}
        self._ranks: dict[str, int] = {}
        self._origin: str | None = None
        self._target: int | None = None
        self._faults = rng.choice([0, 2, 4, 8, 16])
        self.coordinator = SimCoordinator(loop, self)
        names = [f"shard-{n:03}" for n in range(self.shard_count)]
        self.shards = {name: SimShard(loop, name, self) for name in names}
        self.workers: list[SimWorker] = []
        for _ in range(rng.randint(self.spec.min_workers, 3)):
            self._begin_worker()

    # --- the course of things -------------------------------------------------------------------

    def run(self) -> None:
        """Runs to the end.

        Raises:
            Violation: a promise is broken.
        """
        while not self._finished():
            if self.loop.now > FAULTS_S + PATIENCE_S:
                raise Violation(f"seed {self.seed}: {self._stuck()}")
            if self.loop.now < FAULTS_S:
                self._maybe_fault()
            elif self._target is None:
                self._heal()
            process = self.loop.next()
            if process is not None:
                self._check(process)

    def trace(self, text: str, *facts: object) -> None:
        if self.lines is not None:
            self.lines.append(f"{self.loop.now:8.3f}  {text % facts}")

    def mishap(self, probability: float) -> bool:
        """Whether the network loses something now."""
        return self.loop.rough and self._rng.random() < probability

    def resting(self, worker: SimWorker) -> bool:
        """Whether the worker has taken all its steps."""
        return self._target is not None and worker.worker.version >= self._target

    def runs(self, index: int) -> Iterator[Run]:
        """A slice in pieces, other ones each time."""
        count, start = self._slices[index].element_count, 0
        while start < count:
            step = self._rng.randint(1 + (count - start) // 4, count - start)
            yield Run(slice=index, start=start, count=step, dtype=DType.FLOAT32)
            start += step

    def exchange(self, sender: SimShard, peer: str, request: ExchangeRequest) -> None:
        """Carries a report; it may be lost, doubled or late, and so may the answer."""
        receiver = self.shards[peer]

        def answer() -> None:
            response = receiver.exchange(request)
            report = response.report if response else None
            if report is not None and not self.mishap(0.1):
                sender.after(self.loop.delay_s(), lambda: sender.deliver(report))

        for _ in range(2 if self.mishap(0.1) else 1):
            if not self.mishap(0.2):
                receiver.after(self.loop.delay_s(), answer)

    # --- faults ---------------------------------------------------------------------------------

    def _maybe_fault(self) -> None:
        if self._faults > 0 and self._rng.random() < 0.01:
            self._faults -= 1
            fault = self._rng.choice(
                [
                    self._kill_worker,
                    self._kill_worker,
                    self._begin_worker,
                    self._begin_worker,
                    self._break_control,
                    self._break_control,
                    self._break_data,
                    self._break_data,
                    self._break_data,
                ]
            )
            fault()

    def _live(self) -> list[SimWorker]:
        return [worker for worker in self.workers if worker.alive]

    def _begin_worker(self) -> None:
        leave_at = (
            self._rng.randint(0, 20) if self.loop.rough and self._rng.random() < 0.3 else None
        )
        name = f"worker-{len(self.workers):03}"
        self.trace("FAULT %s begins, leaves at %s", name, leave_at)
        self.workers.append(SimWorker(self.loop, name, self, leave_at=leave_at))

    def _kill_worker(self) -> None:
        if live := self._live():
            worker = self._rng.choice(live)
            self.trace("FAULT %s is killed", worker.name)
            worker.kill()

    def _break_control(self) -> None:
        member = self._rng.choice([*self._live(), *self.shards.values()])
        if member.control is not None:
            self.trace("FAULT control stream of %s breaks", member.name)
            member.control.cut()

    def _break_data(self) -> None:
        streams = [stream for worker in self._live() for stream in worker.streams]
        if streams:
            stream: Stream = self._rng.choice(sorted(streams, key=lambda one: one.order))
            self.trace("FAULT stream %s-%s breaks", stream.caller.name, stream.server.name)
            self._rng.choice([stream.cut, stream.lose_answers])()

    def _heal(self) -> None:
        """Faults are over: whoever lives takes some more steps, and the others come back."""
        self.loop.rough = False
        while sum(worker.leave_at is None for worker in self._live()) < self.spec.min_workers:
            self._begin_worker()
        self._target = (
            max(0, *(shard.rounds.version for shard in self.shards.values())) + STEPS_AFTER
        )
        self.trace("HEALED, target %d", self._target)

    def _finished(self) -> bool:
        return self._target is not None and all(
            self.resting(worker) for worker in self._live() if worker.leave_at is None
        )

    def _stuck(self) -> str:
        workers = [
            f"{one.name} at {one.worker.version} of generation {one.worker.promised}"
            f"{'' if one.worker.plan else ' (frozen)'}"
            for one in self._live()
        ]
        shards = [f"{one.name} at {one.rounds.version}" for one in self.shards.values()]
        return f"nobody goes on to step {self._target}: {', '.join(workers + shards)}"

    # --- what must hold -------------------------------------------------------------------------

    def truth(self, origin: str, version: int) -> History:
        """The one history of a version that some slice has taken."""
        return self._truth[origin, version]

    def check_entry(self, entry: Entry) -> None:
        """Ranks ascend, and are neither changed nor given again (G2); one lineage is opened."""
        for worker in entry.workers:
            if worker.id not in self._ranks:
                if worker.rank <= max(self._ranks.values(), default=-1):
                    raise Violation(f"rank {worker.rank} of {worker.id} is not above all others")
                self._ranks[worker.id] = worker.rank
            if self._ranks[worker.id] != worker.rank:
                raise Violation(f"rank of {worker.id} changes to {worker.rank}")
        if entry.opened and entry.lineage is not None:
            self._origin = self._origin or entry.lineage.origin
            if self._origin != entry.lineage.origin:
                raise Violation(f"a second lineage is opened, from {entry.lineage.origin}")

    def check_told(self, member: str, message: FromCoordinator) -> None:
        """A leaver goes only when nobody who stays has less than it (C8)."""
        held = {worker.name: worker.worker.version for worker in self._live()}
        if not isinstance(message, Bye) or message.error is not None or member not in held:
            return
        for other in self.coordinator.coordinator.jobs[self.job].entry.workers:
            stays = other.id != member and not other.leaving
            if stays and held.get(other.id, held[member]) < held[member]:
                raise Violation(f"{member} is let go before {other.id} has its version")

    def check_took(self, worker: SimWorker) -> None:
        """A worker that has taken a step holds one version, and the record of it."""
        version, record = worker.worker.version, worker.worker.record
        held = {element for values in worker.values for element in values}
        if {history.version for history in held} != {version} or len(held) != 1:
            raise Violation(f"{worker.name} took step {version} and holds {held}")
        if version > 0:
            step = held.pop().steps[-1]
            if record is None or (record.step, record.workers) != (version, step.workers):
                raise Violation(f"{worker.name} at {version} has the record {record}")

    def _check(self, process: Process) -> None:
        if isinstance(process, SimShard):
            self._check_shard(process)
        elif isinstance(process, SimWorker) and process.alive:
            self._check_worker(process)

    def _check_shard(self, shard: SimShard) -> None:
        rounds = shard.rounds
        for index, version in rounds.versions.items():
            history = shard.weights.get(index)
            if history is None or history.version != version:
                raise Violation(f"{shard.name} holds {history} as slice {index} at {version}")
            self._agree(history)
        if rounds.opened:
            order = self._orders.setdefault(rounds.promised, rounds.order)
            if order != rounds.order:
                raise Violation(f"{shard.name} sums {rounds.order} in a generation of {order}")

    def _check_worker(self, worker: SimWorker) -> None:
        if not worker.worker.slices:
            return  # it has not heard of the job yet
        for piece, elements in zip(worker.slices, worker.values, strict=True):
            version = worker.worker.held([piece.index])
            if version >= 0:
                if {history.version for history in elements} != {version}:
                    raise Violation(f"{worker.name} holds {elements} as {piece} at {version}")
                self._agree(elements[0])

    def _agree(self, history: History) -> None:
        """All slices anywhere have one history (step, workers in order, outcome) per version."""
        known = self._truth.setdefault((history.origin, history.version), history)
        if known is history and self._last is history:
            return
        self._last = history
        if known != history:
            raise Violation(f"two histories of version {history.version}: {known}, {history}")
        if history.steps:
            before = self._truth.get((history.origin, history.version - 1))
            if before is not None and before.steps != history.steps[:-1]:
                raise Violation(f"{history} does not go on from {before}")
