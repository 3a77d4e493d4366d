"""A worker's process: a real `Worker`, with a stand-in for the session's threads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tests.sim.clockwork import Task
from tests.sim.history import Gradient, Violation, Weights
from tests.sim.member import Member
from tests.sim.talks import Talk, Talks
from tests.sim.uploads import Uploads, by_shard

from adashard.wire.control import (
    Bye,
    Freeze,
    FromCoordinator,
    Hello,
    Open,
    Opened,
    PlanRequest,
    Renewal,
    Stale,
    WorkerHello,
)
from adashard.wire.errors import AdashardError, LeaseExpired, StaleGeneration, from_info
from adashard.wire.messages import (
    AdafactorStep,
    Begin,
    Entry,
    GroupStep,
    Plan,
    Record,
    Schedule,
)
from adashard.wire.version import VERSION
from adashard.worker import Worker

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

LEAVE_S = 10.0
ADAFACTOR = AdafactorStep(eps1=1e-30, eps2=1e-3, clip_threshold=1.0)


class SimWorker(Member):
    """Trains until it is killed or told to end; computes a gradient from the weights it holds."""

    def __init__(self, name: str, cluster: Cluster, *, leave_at: int | None = None) -> None:
        rng = cluster.loop.rng
        self.worker = Worker(name, cluster.job)
        self.values: list[Weights | None] = [None] * len(cluster.truth.slices)
        self.ended: AdashardError | None = None
        self.leave_at = leave_at
        self.max_grad_norm = rng.choice([0.0, 0.0, 0.5])
        self.talks = Talks(self)
        self.uploads = Uploads(self)
        self.promised = 0
        self.incoming: Record | None = None  # of the step that is being taken
        self._gradients = 0
        self.swapped: set[int] = set()  # slices whose weights user code has changed for a while
        self.evaluates = False  # before its next step
        self._fresh = True  # whether it holds nothing but what it was built with
        self._begun = -1  # the step of which a push may have reached a shard
        self._unchanged = True
        super().__init__(name, cluster)
        self.start(self._train())

    def copies(self) -> dict[int, Weights]:
        held = {}
        for index, weights in enumerate(self.values if self.worker.slices else ()):
            version = self.worker.held([index])
            if version >= 0:
                if weights is None or weights.version != version:
                    raise Violation(f"{self.name} has {weights} as slice {index} at {version}")
                held[index] = weights
        return held

    # --- the training loop's thread -------------------------------------------------------------

    def _train(self) -> Task:
        try:
            while not self._wants_to_leave():
                yield self.loop.rng.uniform(0.01, 0.2)
                yield lambda: not self.cluster.resting(self) or self._wants_to_leave()
                if self.evaluates and self.worker.version > 0:
                    yield from self._evaluate()
                yield from self._step()
        except AdashardError as error:
            self.cluster.ended(self, error)
            self.kill()
            return
        self.worker.leaving = True
        self.renew()
        self.after(LEAVE_S, self.kill)
        yield lambda: self.ended is not None
        self.kill()

    def _evaluate(self) -> Task:
        """User code has other weights in half of the model for a while."""
        self.evaluates = False
        self.swapped.update(range(0, len(self.values), 2))
        yield self.loop.rng.uniform(1.0, 5.0)
        self.swapped.clear()

    def _wants_to_leave(self) -> bool:
        return self.leave_at is not None and self.worker.version >= self.leave_at

    def _gradient(self) -> Gradient | None:
        """Of the weights as they stand, for the step after; None before it has any of the job's."""
        held = self.values
        lines = {weights.line for weights in held if weights is not None}
        if not lines or self.worker.version < 0:
            return None
        if len(lines) != 1 or None in held:
            raise Violation(f"{self.name} computes on mixed weights: {held}")
        (line,) = lines
        values = hash(tuple(weights.value for weights in held if weights is not None))
        self._gradients += 1
        number = hash((int(self.name[-3:]), self._gradients))
        return Gradient(self.name, line.version + 1, number, line, values, *self._contents())

    def _contents(self) -> tuple[bytes, tuple[int, ...], bool]:
        """Which parameters have a gradient, what of it is not finite, and whether that is said."""
        rng, count = self.loop.rng, len(self.cluster.spec.parameters)
        present = [parameter for parameter in range(count) if rng.random() < 0.9]
        poisoned = (rng.choice(present),) if present and rng.random() < 0.03 else ()
        said = bool(poisoned) and rng.random() < 0.5
        bits = 0 if said else sum(1 << parameter for parameter in present)
        return bits.to_bytes((count + 7) // 8, "little"), poisoned, said

    def _step(self) -> Task:
        """One call of `step()`: with a gradient, or with none that is worth anything yet."""
        gradient = self._gradient()
        target, lineage = None, None
        while target is None or self.worker.version < target:
            yield lambda: self.worker.plan is not None or self.ended is not None
            if self.ended is not None:
                raise self.ended
            plan = self.worker.plan
            assert plan is not None
            if plan.entry.lineage != lineage:  # the gradient may be one of other weights
                target, lineage, self._unchanged = None, plan.entry.lineage, True
            try:
                if self.worker.version < plan.base:
                    push = gradient if target == plan.base else None
                    yield from self._take(plan, plan.base, push)
                    if target is None and not self._unchanged:
                        return
                else:
                    if target is None:
                        target = self.worker.version + 1
                        gradient = self._named(gradient, target)
                    yield from self._take(plan, target, gradient)
            except StaleGeneration:
                yield self.loop.rng.uniform(0.01, 0.2)

    def _named(self, gradient: Gradient | None, step: int) -> Gradient:
        """The gradient under its name, once its step is known."""
        found = gradient or self._gradient()
        assert found is not None
        if found.step != step:  # what came meanwhile were the same bits, of a step that was skipped
            line = self.copies()[0].line
            found = found._replace(step=step, line=line)
        self.cluster.truth.pushes(found)
        return found

    def _take(self, plan: Plan, step: int, gradient: Gradient | None) -> Task:
        begin = self._first_frame(plan.entry, step)
        talks = []
        for shard, indices in by_shard(plan.entry).items():
            behind = self.worker.behind(indices, step)
            if behind:
                wanted = self.worker.owes(plan, behind, step) if gradient else []
                push = gradient if wanted else None
                slices = () if len(behind) == len(indices) else tuple(behind)
                version = self.worker.held(behind)
                first = replace(begin, receiver=shard, version=version, slices=slices)
                if push is not None:
                    first = self._with_push(first, push)
                talks.append(Talk(first, behind, wanted, push, begun=step == self._begun))
        if any(talk.gradient for talk in talks):
            self._begun = step
        yield from self.talks.talk(talks)
        self.worker.took(plan, step)
        self.cluster.promises.took(self)
        self.cluster.reached("step returned", self)

    def _first_frame(self, entry: Entry, step: int) -> Begin:
        return Begin(
            job=self.cluster.job,
            generation=entry.generation,
            sender=self.name,
            receiver="",
            step=step,
            push=False,
            state=True,
        )

    def _with_push(self, begin: Begin, gradient: Gradient) -> Begin:
        counts = sorted({count + 1 for count in self.worker.step_counts()})
        schedules = tuple(Schedule(step_count=count, beta2=0.5, rho=0.1) for count in counts)
        return replace(
            begin,
            push=True,
            present=gradient.present,
            not_finite=gradient.not_finite if gradient.said else (),
            groups=(GroupStep(adafactor=ADAFACTOR, schedules=schedules),),
            max_grad_norm=self.max_grad_norm,
        )

    def arrived(self, index: int, weights: Weights | None, step: int) -> None:
        """A slice has come whole, or has the step without a change of its weights."""
        unchanged = weights is None
        self.worker.arrived(index, step, unchanged=unchanged)
        before = self.values[index]
        self._fresh = False
        if weights is None:
            weights = self._unchanged_weights(index, step)
        self._unchanged &= before == weights
        self.values[index] = weights
        self.swapped.discard(index)
        self.cluster.changed = True

    def _unchanged_weights(self, index: int, step: int) -> Weights:
        """The record came first: what did not change has the step nevertheless."""
        before = self.values[index]
        if before is None or before.version not in (step - 1, step):
            raise Violation(f"{self.name} is told that slice {index} is unchanged: {before}")
        if before.version == step:
            return before
        assert self.incoming is not None
        assert self.incoming.step == step
        return self.cluster.truth.following(before, index, self.incoming)

    # --- the control stream's thread ------------------------------------------------------------

    def hello(self) -> Hello:
        worker = WorkerHello(
            job=self.cluster.job, spec=self.cluster.spec, generation=self.worker.promised
        )
        return Hello(
            id=self.name, version=VERSION, host="host", pid=1, worker=worker, entries=self.entries()
        )

    def renewal(self) -> Renewal:
        standings = (self.worker.standing(),)
        return Renewal(standings=standings, broken_links=self.links.broken())

    def handle(self, message: FromCoordinator) -> None:
        match message:
            case Freeze(entry=entry):
                self._freeze(entry)
            case PlanRequest(plan=plan):
                self.uploads.supply(plan)
            case Open(plan=plan):
                if self.worker.open(plan):
                    self.entry, self.incoming = plan.entry, plan.record
                    self.cluster.changed = True
                    self.tell(Opened(job=self.cluster.job, generation=plan.entry.generation))
            case Bye(generation=generation, error=error):
                if generation >= self.worker.promised:
                    self.ended = from_info(error) if error else LeaseExpired("left the job")
                    self.talks.cancel()

    def _freeze(self, entry: Entry) -> None:
        answer = self.worker.freeze(entry)
        self.promised = max(self.promised, entry.generation)
        if not isinstance(answer, Stale):
            self.entry = entry
            self._become_origin(entry)
        if self.worker.plan is None:
            self.talks.cancel()
        self.tell(answer)
        self.cluster.reached("freeze answered", self)

    def _become_origin(self, entry: Entry) -> None:
        """What it was built with is the first version of a lineage that names it."""
        lineage = entry.lineage
        if lineage is not None and self.worker.version == lineage.base_version and self._fresh:
            number = int(self.name[-3:])
            values = [hash((number, piece.index)) for piece in self.cluster.truth.slices]
            self.values = [*self.cluster.truth.begin(lineage, values)]
            self.cluster.changed = True
            self._fresh = False
