"""One job's steps on one shard, decided: events in, instructions out.

This is the shard's half of the protocol (docs/protocol.md, rules S1 to S8) and nothing else: it
holds no tensor, no lock and no clock. `engine.py` feeds it and carries out what it says.

    collecting t ──all sums full──▶ exchanging t ──all reports here──▶ committed t = collecting t+1

What is between full sums and a record is `exchanges.py`; whose gradients are in them, `sums.py`.

A committed step is *owed* by every slice until it is applied; whoever needs the slice first pays
(a reply, the next gradient, a change of generation). A slice can pay once its sum is full. It is
full when the step is committed here, and kept, so a shard that is frozen half way through has lost
nothing. It is not where the slice has been rebuilt at the version before: then the step's workers,
who keep their gradients until all of the step is theirs, push them again, and nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from adashard.wire.control import Frozen, FullSums, Stale
from adashard.wire.errors import InvalidFrame, InvalidRequest, StaleGeneration
from adashard.wire.messages import (
    Acknowledge,
    Begin,
    Entry,
    Exchange,
    Outcome,
    Plan,
    Record,
    Report,
)
from adashard.wire.placement import Slice, cut
from adashard_server.shard.exchanges import Exchanges, Holdings, holdings
from adashard_server.shard.instructions import (
    Add,
    Admission,
    Committed,
    Degraded,
    Instruction,
    Measure,
    Wait,
)
from adashard_server.shard.partials import Finding
from adashard_server.shard.pushes import check_formats, check_push, check_same
from adashard_server.shard.records import bit, counts_before, without
from adashard_server.shard.sums import Sums


class Rounds:
    """The rounds of one job on one shard. Not thread-safe: its engine's lock covers every call."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.entry: Entry | None = None
        self.promised = 0
        self.opened = False
        self.lineage = 0
        self.slices: tuple[Slice, ...] = ()
        self.versions: dict[int, int] = {}
        self.record: Record | None = None
        self._before: Record | None = None  # that of the step before the newest decided one
        self.order: tuple[str, ...] = ()
        self.sums = Sums()
        self._plan: Plan | None = None
        self._held: Holdings | None = None
        self._step = 0  # the step that is collected, or owed
        self._owed: set[int] = set()
        self._degraded: set[int] = set()  # owed, and to be finished without some of its workers
        self._remaining: Record | None = None  # the newest record, of those workers that are left
        self._exchanges: Exchanges | None = None  # of the step that is collected
        self._last: Exchanges | None = None  # of the step before

    @property
    def version(self) -> int:
        """The newest step that is decided here, applied or owed; -1 before any weights."""
        return self._step if self._owed else self._step - 1

    @property
    def mine(self) -> tuple[int, ...]:
        """Slices placed on this shard in the newest generation, ascending."""
        return self._held.by_shard.get(self.shard, ()) if self._held else ()

    # --- a change of generation -----------------------------------------------------------------

    def freeze(self, entry: Entry) -> Frozen | Stale:
        """Promises the generation of `entry` (S1). Repeated: the same answer."""
        if entry.generation < self.promised:
            return Stale(job=entry.job, promised=self.promised)
        if entry.generation > self.promised:
            if self.entry is None or self.entry.spec != entry.spec:
                self._forget(entry)
            self.entry, self.promised, self.opened = entry, entry.generation, False
            self._plan, self._held = None, holdings(entry, self.slices)
        held = tuple(sorted(self.versions))
        full = [index for index in held if self._full(index) and index not in self._degraded]
        workers = self.record.workers if self._owed and self.record else self.order
        sums = FullSums(step=self._step, workers=workers, slices=tuple(full))
        return Frozen(
            job=entry.job,
            generation=self.promised,
            lineage=self.lineage,
            slices=held,
            versions=tuple(self.versions[index] for index in held),
            sums=(sums,) if full else (),
            record=self._record_of(max(self.versions.values(), default=-1)),
        )

    def plan(self, plan: Plan) -> None:
        """Takes what the generation begins with (S2); what can be paid then is to be applied.

        Raises:
            StaleGeneration: another generation is promised.
        """
        self.check_promised(plan.entry.generation)
        if self.opened:
            return
        self._plan = plan
        lineage = plan.entry.lineage.number if plan.entry.lineage else 0
        if lineage != self.lineage:
            self.lineage = lineage
            self.versions.clear()
            self._restart(plan)
        elif plan.base < self.version:
            self._owed.clear()  # no slice anywhere has the step: it is formed again
            self._degraded.clear()
            self.record = plan.record
        elif plan.base > self.version and plan.record and plan.record.step == self._step:
            self._decide(plan.record)
        elif plan.base > self.version:
            self._restart(plan)

    def lacks(self, index: int, version: int) -> bool:
        """Whether an upload of the slice brings what is not here; written over, it would tear."""
        return self.versions.get(index, -1) < version

    def uploaded(self, index: int, version: int) -> None:
        """A whole slice has come from the source that the plan names."""
        self.versions[index] = version
        self.sums.drop(index)
        if index in self._owed and version >= self._step:
            self._paid(index)

    def has_plan(self, generation: int) -> bool:
        """Whether the plan of `generation` has come."""
        return self._plan is not None and self._plan.entry.generation == generation

    @property
    def planned(self) -> bool:
        """Whether every slice placed here is at the version that the plan begins with."""
        plan = self._plan
        if plan is None:
            return False
        behind = set(plan.behind)
        return all(
            self.versions.get(index, -1) >= plan.base - (index in behind) for index in self.mine
        )

    def open(self, plan: Plan) -> list[Instruction]:
        """Goes on from `plan` (S3): old reports are void, sums that still hold are kept (S4)."""
        self.check_promised(plan.entry.generation)
        if self.opened:
            return []
        self._plan, self.opened = plan, True
        for index in set(self.versions) - set(self.mine):
            del self.versions[index]
            self.sums.drop(index)
        behind = {index for index in self.mine if self.versions[index] < plan.base}
        step = plan.base if behind else plan.base + 1
        if self._step != step:
            self._collect(step)
        if behind:
            self.record = plan.record
        self._owed = behind
        workers = sorted(plan.entry.workers, key=lambda worker: worker.rank)
        self.order = tuple(worker.id for worker in workers if not worker.leaving)
        self._exchanges = self._last = None
        return [*self._reorder(), *self._go_on(self.mine)]

    def _reorder(self) -> list[Instruction]:
        """Keeps the sums whose addends are a prefix, in rank order, of the list in force (S4).

        Of an owed slice this is the list of the step's record. Where a worker of it is gone, and
        has left less than its whole gradient in the sum, the others finish the step without it.
        """
        record = self.record if self._owed else None
        summed = record.workers if record else self.order
        self.sums.keep({*summed, *self.order})
        self._degraded.clear()
        for index in self.mine:
            self.sums.keep_prefix(index, summed)
        if record is None:
            return []
        gone = [worker for worker in summed if worker not in self.order]
        lost = {
            index
            for index in self._owed
            if self.updates(index) and not all(self.sums.done(worker, index) for worker in gone)
        }
        if not lost:
            return []
        self._degraded, self._remaining = lost, without(record, gone)
        for index in lost:
            self.sums.keep_prefix(index, self._remaining.workers)
        return [Degraded(record.step, tuple(sorted(lost)), tuple(gone))]

    # --- pushes ---------------------------------------------------------------------------------

    def check(self, generation: int, sender: str) -> None:
        """Refuses what another generation, or nobody of this one, sends (G1).

        Raises:
            StaleGeneration: the sender waits for the next generation, or joins again.
        """
        if generation != self.promised or not self.opened or sender not in self.order:
            raise StaleGeneration(
                f"generation {generation} of {sender} is not the open one of shard {self.shard} "
                f"({self.promised}{'' if self.opened else ', frozen'})",
                generation=generation,
                promised=self.promised,
            )

    def begin(self, begin: Begin) -> tuple[Acknowledge, list[Instruction]]:
        """A worker wants `begin.step`, with or without a push for it (S5, S8).

        Nothing may be owed when it pushes for the step after: a worker that has all of a version
        has it from here, so the engine settles first and no honest worker waits for it.

        Raises:
            StaleGeneration: of another generation, or frozen.
            InvalidRequest: the step is not one that this worker can be at, the push does not fit
                the job, or it is another than the worker began before.
        """
        self.check(begin.generation, begin.sender)
        assert self.entry is not None
        check_formats(begin, self.entry.spec)
        if begin.step == self.version and not (begin.push and self._lacking(begin.sender)):
            return Acknowledge(version=self.version, complete=True), []
        if begin.step != self._step:
            raise InvalidRequest(
                f"worker {begin.sender} asks shard {self.shard} for step {begin.step} of job "
                f"{begin.job!r}, which stands at {self.version}"
            )
        if not begin.push:
            return Acknowledge(version=self.version), []
        check_push(begin, self.entry.spec, self._step_counts())
        check_same(begin, self.sums.begins.get(begin.sender))
        self.sums.begins[begin.sender] = begin
        instructions = self._go_on(self.mine)
        acknowledge = Acknowledge(
            version=self.version,
            complete=all(self.sums.done(begin.sender, index) for index in self._owed or self.mine),
            progress=self.sums.progress_of(begin.sender),
        )
        return acknowledge, instructions

    def admit(
        self, begin: Begin, index: int, start: int, count: int, *, ahead: int = 0
    ) -> Admission:
        """What to do with `count` elements of a pushed slice from element `start`.

        Args:
            begin: the push.
            index: the slice.
            start: the first element; a gradient of sparse rows may leave out zeros before it.
            count: how many; 0 in a gradient of sparse rows says that no more come before `start`.
            ahead: up to where the worker's elements have come and wait for others.

        Returns:
            None where they are in the sum already.

        Raises:
            StaleGeneration: the generation has ended meanwhile.
            InvalidFrame: the slice or the range is not one that may come now.
        """
        self.check(begin.generation, begin.sender)
        order = self._order(index)
        if begin.step <= self.version and not self._takes(begin, index, order):
            return None  # decided, with this push in it
        stop = start + count
        sparse = index in self.versions and self.sums.sparse(begin, index)
        least = 0 if sparse else 1
        if index not in self.versions or count < least or stop > self._count(index):
            raise InvalidFrame(
                f"elements {start} to {stop} of slice {index} are not held by shard {self.shard}"
            )
        done = self.sums.progress(begin.sender, index)
        came = max(done, ahead)
        if stop <= came:
            return None
        if start > came and not sparse:
            raise InvalidFrame(
                f"slice {index} of worker {begin.sender} goes on at element {start}, not {came}"
            )
        before = order[: order.index(begin.sender)]
        if came > done or any(self.sums.progress(worker, index) < stop for worker in before):
            return Wait()
        return Add(done, stop, first=all(self.sums.absent(worker, index) for worker in before))

    def _takes(self, begin: Begin, index: int, order: tuple[str, ...]) -> bool:
        """Whether an owed slice lacks this push."""
        behind = begin.step == self.version and index in self._owed
        return behind and begin.sender in order and not self.can_pay(index)

    def added(self, begin: Begin, index: int, stop: int) -> list[Instruction]:
        """Elements up to `stop` of the worker's gradient are in the sum."""
        self.sums.added(begin.sender, index, stop)
        return self._go_on((index,))

    # --- the round ------------------------------------------------------------------------------

    def wants(self, measure: Measure) -> bool:
        """Whether what is asked of slices is still to be found: in this generation and exchange."""
        exchanges = self._exchanges
        return self.opened and exchanges is not None and exchanges.wants(measure)

    def measured(self, measure: Measure, findings: Mapping[int, Finding]) -> list[Instruction]:
        """What was asked of slices has been found; ignored where it is no longer wanted."""
        if self._exchanges is None or not self.wants(measure):
            return []
        return self._decided(self._exchanges.measured(measure, findings))

    def exchange(self, report: Report) -> list[Instruction]:
        """Another shard's round is full (S6).

        Raises:
            StaleGeneration: the report is of another generation.
            InvalidRequest: it is not one that its sender can have made in this one.
        """
        if report.generation != self.promised or not self.opened:
            raise StaleGeneration(
                f"a report of generation {report.generation} came to shard {self.shard}, "
                f"which is at {self.promised}{'' if self.opened else ', frozen'}"
            )
        exchanges = self._exchanging()
        exchanges.check(report)
        if report.step != self._step or self._owed:
            return []
        return self._decided(exchanges.take(report))

    def own_report(self, step: int, exchange: Exchange) -> Report | None:
        """This shard's report of `step`, kept until its next, also after the commit (S6)."""
        kept = (one for one in (self._exchanges, self._last) if one and one.step == step)
        own = next((one.own(exchange) for one in kept), None)
        return own if own and own.generation == self.promised else None

    def repeat(self) -> list[Instruction]:
        """What to send again while the own report has not led to a commit."""
        return self._exchanges.repeat() if self.opened and self._exchanges else []

    def applied(self, index: int) -> None:
        """The slice has taken the step it owed; after the last one the next is collected."""
        self.versions[index] = self._step
        self._paid(index)

    @property
    def payable(self) -> list[int]:
        """Slices that can take the newest decided step now, ascending."""
        return [index for index in sorted(self._owed) if self.can_pay(index)]

    @property
    def owed(self) -> frozenset[int]:
        """Slices that have not yet taken the newest decided step."""
        return frozenset(self._owed)

    def owes(self, index: int) -> bool:
        """Whether the slice is to take the newest decided step now; not while frozen (S1)."""
        return index in self._owed and self._plan is not None and self.can_pay(index)

    def awaits(self, index: int) -> bool:
        """Whether the slice owes the newest decided step and its gradients are on their way."""
        return index in self._owed and self.opened and not self.can_pay(index)

    def can_pay(self, index: int) -> bool:
        """Whether a slice that owes a step has all that it takes: the sum, or no use for one."""
        return not self.updates(index) or self._full(index)

    def record_for(self, index: int) -> Record:
        """The record by which an owed slice takes its step: of those whose gradients it has."""
        record = self._remaining if index in self._degraded else self.record
        assert record is not None
        return record

    def updates(self, index: int) -> bool:
        """Whether the newest record changes the slice's weights, or only its version."""
        record = self.record
        return (
            record is not None
            and record.outcome is Outcome.APPLY
            and bit(record.present, self.slices[index].parameter)
            and not self.sums.nobody(index, self.record_for(index).workers)
        )

    # --- inside ---------------------------------------------------------------------------------

    def _forget(self, entry: Entry) -> None:
        """Drops everything: the job begins anew, as another model."""
        self.slices, self.lineage = cut(entry.spec), 0
        self.record, self._before, self.order = None, None, ()
        self.sums = Sums(self.slices)
        self.versions.clear()
        self._collect(0)

    def _restart(self, plan: Plan) -> None:
        """Goes on from the plan with what is uploaded: of what was here, nothing is of use."""
        self.record, self._before = plan.record, None
        self._collect(plan.base + 1)

    def _collect(self, step: int) -> None:
        """Begins to collect `step` with nothing in the sums."""
        self._step = step
        self._owed.clear()
        self._degraded.clear()
        self.sums.clear()
        self._last, self._exchanges = self._exchanges, None

    def _exchanging(self) -> Exchanges:
        """The exchanges of the step that is collected; begun when its first event comes."""
        if self._exchanges is None:
            assert self._held is not None
            self._exchanges = Exchanges(self.shard, self._step, self.order, self._held)
        return self._exchanges

    def _go_on(self, candidates: Iterable[int]) -> list[Instruction]:
        """Tells the exchanges of sums that are full; of nothing before all pushes have begun."""
        if not self.opened or self._owed or not self._complete():
            return []
        exchanges = self._exchanging()
        if not exchanges.begun:
            begins = [self.sums.begins[worker] for worker in self.order]
            exchanges.begin(begins, self._step_counts())
            candidates = self.mine
        full = [index for index in candidates if self._full(index)]
        return self._decided(exchanges.full(full))

    def _decided(self, instructions: list[Instruction]) -> list[Instruction]:
        """Takes over the record that the exchanges have come to, if they have."""
        exchanges = self._exchanges
        record = exchanges.record if exchanges else None
        if exchanges is None or record is None:
            return instructions
        self._decide(record)
        return [*instructions, Committed(record, exchanges.squared_sum, exchanges.poison)]

    def _complete(self) -> bool:
        """Whether every worker of the round has begun its push."""
        return bool(self.order) and bool(self.mine) and set(self.sums.begins) >= set(self.order)

    def _decide(self, record: Record) -> None:
        """A step is decided: all slices at the version before owe it."""
        self._before, self.record = self.record, record
        self._owed = {
            index for index, version in self.versions.items() if version == record.step - 1
        }
        for index in self._owed:
            self.sums.keep_prefix(index, record.workers)
        if not self._owed:
            self._collect(record.step + 1)

    def _paid(self, index: int) -> None:
        self._owed.discard(index)
        if not self._owed:
            self._collect(self._step + 1)

    def _order(self, index: int) -> tuple[str, ...]:
        """The workers whose gradients make up the slice's sum, by rank."""
        return self.record_for(index).workers if index in self._owed else self.order

    def _lacking(self, worker: str) -> bool:
        """Whether a slice that owes the newest decided step waits for the worker's gradient."""
        return any(worker in self._order(index) and not self.can_pay(index) for index in self._owed)

    def _full(self, index: int) -> bool:
        return self.sums.full(index, self._order(index))

    def _record_of(self, version: int) -> Record | None:
        """The record of a version that slices have here, if it is one of the newest two."""
        known = (record for record in (self.record, self._before) if record is not None)
        return next((record for record in known if record.step == version), None)

    def _count(self, index: int) -> int:
        return self.slices[index].element_count

    def check_promised(self, generation: int) -> None:
        """Refuses the plan of a generation that is not the promised one.

        Raises:
            StaleGeneration: it is not.
        """
        if generation != self.promised:
            raise StaleGeneration(
                f"shard {self.shard} has promised generation {self.promised}, not {generation}"
            )

    def _step_counts(self) -> tuple[int, ...]:
        """Each parameter's count of updates before the step that is collected, or owed."""
        assert self.entry is not None
        if self.record is None:
            return (0,) * len(self.entry.spec.parameters)
        return counts_before(self.record) if self._owed else self.record.step_counts
