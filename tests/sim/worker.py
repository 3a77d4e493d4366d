"""A worker's process: a real `Worker`, with a stand-in for the session's two threads."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

from tests.sim.clockwork import END, Broken, Loop, Stream, Task
from tests.sim.history import Gradient, History, Violation
from tests.sim.member import Member

from adashard.wire.control import (
    Bye,
    Freeze,
    FromCoordinator,
    Hello,
    Open,
    Opened,
    PlanRequest,
    Renewal,
    WorkerHello,
)
from adashard.wire.errors import AdashardError, LeaseExpired, StaleGeneration, from_info
from adashard.wire.messages import (
    Acknowledge,
    AdafactorStep,
    Begin,
    Entry,
    GroupStep,
    Plan,
    Record,
    Run,
    Schedule,
    UploadBegin,
)
from adashard.wire.placement import cut
from adashard.wire.version import VERSION
from adashard.worker import Worker
from adashard_server.shard.records import bit

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

BACKOFF_S = 0.5
LEAVE_S = 10.0


@dataclass
class Talks:
    """The streams of one step, one to each shard: which have ended, and how."""

    under_way: int = 0
    errors: list[AdashardError] = field(default_factory=list)


@dataclass
class Reading:
    """What one stream has heard of its shard so far."""

    acknowledged: bool = False
    complete: bool = False
    ended: bool = False
    cancelled: bool = False


class SimWorker(Member):
    """Trains until it is killed or told to end; computes a gradient from the weights it holds."""

    def __init__(
        self, loop: Loop, name: str, cluster: Cluster, *, leave_at: int | None = None
    ) -> None:
        self.slices = cut(cluster.spec)
        self.worker = Worker(name, cluster.job)
        own = History(name)
        self.values = [[own] * piece.element_count for piece in self.slices]
        self.ended: AdashardError | None = None
        self.leave_at = leave_at
        self.max_grad_norm = loop.rng.choice([0.0, 0.0, 0.5])
        self._unchanged = True
        self._uploading = False
        self._promised = 0
        self.streams: dict[Stream, Reading] = {}
        super().__init__(loop, name, cluster)
        self.start(self._train())

    # --- the training loop's thread -------------------------------------------------------------

    def _train(self) -> Task:
        try:
            while not self._wants_to_leave():
                yield self.loop.rng.uniform(0.01, 0.2)
                yield lambda: not self.cluster.resting(self) or self._wants_to_leave()
                yield from self._step(self._compute())
        except AdashardError as error:
            if not isinstance(error, LeaseExpired):
                raise Violation(
                    f"{self.name} is refused, without fault of its own: {error}"
                ) from error
            self.kill()
            return
        self.worker.leaving = True
        self.renew()
        self.after(LEAVE_S, self.kill)
        yield lambda: self.ended is not None
        self.kill()

    def _wants_to_leave(self) -> bool:
        return self.leave_at is not None and self.worker.version >= self.leave_at

    def _compute(self) -> Gradient:
        """A gradient of the weights as they stand, for a step that is not known yet."""
        bases = {element for values in self.values for element in values}
        if len(bases) != 1:
            raise Violation(f"{self.name} computes on mixed weights: {bases}")
        count = len(self.cluster.spec.parameters)
        rng = self.loop.rng
        bits = sum(1 << parameter for parameter in range(count) if rng.random() < 0.9)
        present = bits.to_bytes((count + 7) // 8, "little")
        return Gradient(self.name, -1, bases.pop(), present, finite=rng.random() < 0.98)

    def _step(self, gradient: Gradient) -> Task:
        target: int | None = None
        self._unchanged = True
        while target is None or self.worker.version < target:
            yield lambda: self.worker.plan is not None or self.ended is not None
            if self.ended is not None:
                raise self.ended
            plan = self.worker.plan
            assert plan is not None
            try:
                if self.worker.version < plan.base:
                    yield from self._take(plan, plan.base, None)
                    if target is None and not self._unchanged:
                        return
                else:
                    if target is None:
                        target = self.worker.version + 1
                        gradient = gradient._replace(step=target)
                        self.cluster.gradients[self.name, target] = gradient
                    yield from self._take(plan, target, gradient)
            except StaleGeneration:
                continue

    def _take(self, plan: Plan, step: int, gradient: Gradient | None) -> Task:
        begin = self._first_frame(plan.entry, step, gradient)
        talks = Talks()
        for shard, indices in self._by_shard(plan.entry).items():
            behind = self.worker.behind(indices, step)
            if behind:
                slices = () if len(behind) == len(indices) else tuple(behind)
                version = self.worker.held(behind)
                to_shard = replace(begin, receiver=shard, version=version, slices=slices)
                talks.under_way += 1
                self.start(self._talk(to_shard, behind, gradient, talks))
        yield lambda: not talks.under_way
        for error in sorted(talks.errors, key=lambda error: isinstance(error, StaleGeneration)):
            raise error
        self.worker.took(plan, step)
        self.cluster.check_took(self)

    def _first_frame(self, entry: Entry, step: int, gradient: Gradient | None) -> Begin:
        return Begin(
            job=self.cluster.job,
            generation=entry.generation,
            sender=self.name,
            receiver="",
            step=step,
            push=gradient is not None,
            present=gradient.present if gradient else b"",
            groups=(self._settings(),) if gradient else (),
            max_grad_norm=self.max_grad_norm,
        )

    def _settings(self) -> GroupStep:
        counts = sorted({count + 1 for count in self.worker.step_counts()})
        schedules = tuple(Schedule(step_count=count, beta2=0.5, rho=0.1) for count in counts)
        return GroupStep(
            adafactor=AdafactorStep(eps1=1e-30, eps2=1e-3, clip_threshold=1.0), schedules=schedules
        )

    def _by_shard(self, entry: Entry) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index, owner in enumerate(entry.placement):
            found.setdefault(entry.shards[owner].id, []).append(index)
        return found

    # --- a stream's thread ----------------------------------------------------------------------

    def _talk(self, begin: Begin, slices: list[int], push: Gradient | None, talks: Talks) -> Task:
        """One shard's part of a step, repeated under the same name while the stream breaks."""
        first = True
        try:
            while True:
                try:
                    yield from self._exchange(begin, slices, push, first=first)
                    break
                except Broken:
                    first = False
                    yield self.loop.rng.uniform(0.0, BACKOFF_S)
                    self.worker.check(begin.generation)
                    if talks.errors:
                        raise StaleGeneration("another part of the step has failed") from None
        except AdashardError as error:
            talks.errors.append(error)
            self._cut_streams()
        talks.under_way -= 1

    def _exchange(
        self, begin: Begin, slices: list[int], push: Gradient | None, *, first: bool
    ) -> Task:
        self.worker.check(begin.generation)
        shard = self.cluster.shards[begin.receiver]
        stream, reading = Stream(self, shard), Reading()
        shard.start(shard.push_pull(stream))
        self.streams[stream] = reading
        stream.up.send(begin)
        self.start(self._feed(stream, reading, slices, push, first=first))
        try:
            while (item := (yield from stream.down.next())) != END:
                if isinstance(item, AdashardError):
                    raise item
                if isinstance(item, Acknowledge):
                    reading.acknowledged, reading.complete = True, item.complete
                else:
                    self._received(begin, item)
        except Broken:
            if reading.cancelled:
                raise StaleGeneration("ended from this side") from None
            raise
        finally:
            reading.ended = True
            self.streams.pop(stream, None)
        if self.worker.behind(slices, begin.step):
            raise Violation(f"{begin.receiver} ended a reply to {self.name} too early")

    def _feed(
        self,
        stream: Stream,
        reading: Reading,
        slices: list[int],
        push: Gradient | None,
        first: bool,
    ) -> Task:
        if push is not None:
            if not first:
                yield lambda: reading.acknowledged or reading.ended
            for index in slices:
                if not bit(push.present, self.slices[index].parameter):
                    continue
                for run in self.cluster.runs(index):
                    if reading.complete or reading.ended:
                        break
                    stream.up.send((run, push))
                    yield self.loop.rng.uniform(0.0, 0.01)
        stream.up.send(END)

    def _received(self, begin: Begin, item: object) -> None:
        self.worker.check(begin.generation)
        if begin.generation < self._promised:
            raise Violation(f"{self.name} uses a reply of a generation older than it promised")
        if isinstance(item, Record):
            self.worker.take_record(item, begin.step)
            return
        run, history = cast(tuple[Run, History | None], item)
        self.worker.writes(run)
        if run.count:
            if history is None or history.version != begin.step:
                raise Violation(f"a reply of step {begin.step} to {self.name} carries {history}")
            elements = self.values[run.slice]
            self._unchanged &= set(elements[run.start : run.start + run.count]) == {history}
            elements[run.start : run.start + run.count] = [history] * run.count
        elif self.worker.held([run.slice]) not in (begin.step - 1, begin.step):
            raise Violation(f"{self.name} is told that slice {run.slice} is unchanged")
        else:  # the record came first: what did not change has the step nevertheless
            self.values[run.slice] = [
                self.cluster.truth(element.origin, begin.step) for element in self.values[run.slice]
            ]
        self.worker.wrote(run, begin.step)

    def _cut_streams(self) -> None:
        for stream, reading in self.streams.items():
            reading.cancelled = True
            stream.cut()

    def kill(self) -> None:
        super().kill()
        self._cut_streams()

    # --- the control stream's thread ------------------------------------------------------------

    def hello(self) -> Hello:
        worker = WorkerHello(
            job=self.cluster.job, spec=self.cluster.spec, generation=self.worker.promised
        )
        return Hello(id=self.name, version=VERSION, host="host", pid=1, worker=worker)

    def renewal(self) -> Renewal:
        return Renewal(standings=(self.worker.standing(),))

    def handle(self, message: FromCoordinator) -> None:
        match message:
            case Freeze(entry=entry):
                answer = self.worker.freeze(entry)
                self._promised = max(self._promised, entry.generation)
                if self.worker.plan is None:
                    self._cut_streams()
                self.tell(answer)
            case PlanRequest(plan=plan):
                wanted = self.worker.supplies(plan)
                if wanted and not self._uploading:
                    self._uploading = True
                    self.start(self._upload_all(plan, wanted))
            case Open(plan=plan):
                if self.worker.open(plan):
                    self.tell(Opened(job=self.cluster.job, generation=plan.entry.generation))
            case Bye(generation=generation, error=error):
                if generation >= self.worker.promised:
                    self.ended = from_info(error) if error else LeaseExpired("left the job")
                    self._cut_streams()

    def _upload_all(self, plan: Plan, wanted: set[int]) -> Task:
        for shard, indices in self._by_shard(plan.entry).items():
            slices = [index for index in indices if index in wanted]
            if slices:
                begin = UploadBegin(
                    job=self.cluster.job,
                    generation=plan.entry.generation,
                    sender=self.name,
                    receiver=shard,
                    version=plan.base,
                )
                yield from self._upload(begin, slices)
        self._uploading = False  # asked again, it is sent again

    def _upload(self, begin: UploadBegin, slices: list[int]) -> Task:
        shard = self.cluster.shards[begin.receiver]
        stream = Stream(self, shard)
        shard.start(shard.upload(stream))
        self.streams[stream] = Reading()
        stream.up.send(begin)
        for index in slices:
            for run in self.cluster.runs(index):
                stream.up.send((run, self.values[index][run.start]))
                yield self.loop.rng.uniform(0.0, 0.01)
        stream.up.send(END)
        with contextlib.suppress(Broken):
            yield from stream.down.next()
        self.streams.pop(stream, None)
