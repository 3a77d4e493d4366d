"""One job's steps on one shard, decided: events in, instructions out.

This is the shard's half of the protocol (docs/protocol.md, rules S1 to S8) and nothing else: it
holds no tensor, no lock and no clock. `engine.py` feeds it and carries out what it says.

    collecting t ──all sums full──▶ exchanging t ──all reports here──▶ committed t = collecting t+1

What is between full sums and a record is `exchanges.py`.

A committed step is *owed* by every slice until it is applied; whoever needs the slice first pays
(a reply, the next gradient, a change of generation). The sums of an owed slice are full and kept,
so a shard that is frozen half way through a commit has lost nothing.
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
    Instruction,
    Measure,
    Wait,
)
from adashard_server.shard.partials import Finding
from adashard_server.shard.pushes import check_formats, check_push, check_same
from adashard_server.shard.records import bit, draft_record


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
        self.begins: dict[str, Begin] = {}
        self._plan: Plan | None = None
        self._held: Holdings | None = None
        self._step = 0  # the step that is collected, or owed
        self._owed: set[int] = set()
        self._sums: dict[int, dict[str, int]] = {}  # elements in it, by slice and worker
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
        full = tuple(index for index in held if self._full(index))
        sums = FullSums(step=self._step, workers=self.order, slices=full)
        return Frozen(
            job=entry.job,
            generation=self.promised,
            lineage=self.lineage,
            slices=held,
            versions=tuple(self.versions[index] for index in held),
            sums=(sums,) if full else (),
            record=self._before if self._unseen else self.record,
        )

    def plan(self, plan: Plan) -> None:
        """Takes what the generation begins with (S2); what is owed then is to be applied at once.

        Raises:
            StaleGeneration: another generation is promised.
        """
        self.check_promised(plan.entry.generation)
        if self.opened:
            return
        self._plan = plan
        lineage = plan.entry.lineage.number if plan.entry.lineage else 0
        if lineage != self.lineage:
            self.lineage, self.record = lineage, plan.record
            self.versions.clear()
            self._collect(plan.base + 1)
        elif self._owed and plan.base < self._step:
            self._owed.clear()  # no slice anywhere has the step: it is formed again
            self.record = plan.record
        elif plan.record is not None and plan.record.step == self._step and not self._owed:
            self._decide(plan.record)

    def lacks(self, index: int, version: int) -> bool:
        """Whether an upload of the slice brings what is not here; written over, it would tear."""
        return self.versions.get(index, -1) < version

    def uploaded(self, index: int, version: int) -> None:
        """A whole slice has come from the source that the plan names."""
        self.versions[index] = version

    def has_plan(self, generation: int) -> bool:
        """Whether the plan of `generation` has come."""
        return self._plan is not None and self._plan.entry.generation == generation

    @property
    def planned(self) -> bool:
        """Whether every slice placed here is at the version that the plan begins with."""
        plan = self._plan
        return plan is not None and all(
            self.versions.get(index, -1) >= plan.base for index in self.mine
        )

    def open(self, plan: Plan) -> list[Instruction]:
        """Goes on from `plan` (S3): old reports are void, sums that still hold are kept (S4)."""
        self.check_promised(plan.entry.generation)
        if self.opened:
            return []
        self._plan, self.opened = plan, True
        for index in set(self.versions) - set(self.mine):
            del self.versions[index]
        if self._step != plan.base + 1:
            self._collect(plan.base + 1)
        workers = sorted(plan.entry.workers, key=lambda worker: worker.rank)
        self._reorder(tuple(worker.id for worker in workers if not worker.leaving))
        self._exchanges = self._last = None
        return self._go_on(self.mine)

    def _reorder(self, order: tuple[str, ...]) -> None:
        """Keeps the sums whose addends are a prefix, in rank order, of the new list (S4)."""
        for index, total in list(self._sums.items()):
            summed = [worker for worker in self.order if total.get(worker)]
            expected = [worker for worker in order if not self._absent(worker, index)]
            if summed != expected[: len(summed)]:
                del self._sums[index]
        self.begins = {name: begin for name, begin in self.begins.items() if name in order}
        self.order = order

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
        if begin.step == self.version:
            return Acknowledge(version=self.version, complete=True), []
        if begin.step != self._step:
            raise InvalidRequest(
                f"worker {begin.sender} asks shard {self.shard} for step {begin.step} of job "
                f"{begin.job!r}, which stands at {self.version}"
            )
        if not begin.push:
            return Acknowledge(version=self.version), []
        check_push(begin, self.entry.spec, self._step_counts())
        check_same(begin, self.begins.get(begin.sender))
        self.begins[begin.sender] = begin
        instructions = self._go_on(self.mine)
        complete = all(self._done(begin.sender, index) for index in self.mine)
        return Acknowledge(version=self.version, complete=complete), instructions

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
        if begin.step <= self.version:
            return None  # decided, with this push in it
        stop = start + count
        sparse = index in self.versions and self._sparse(begin, index)
        least = 0 if sparse else 1
        if index not in self.versions or count < least or stop > self._count(index):
            raise InvalidFrame(
                f"elements {start} to {stop} of slice {index} are not held by shard {self.shard}"
            )
        done = self._progress(begin.sender, index)
        came = max(done, ahead)
        if stop <= came:
            return None
        if start > came and not sparse:
            raise InvalidFrame(
                f"slice {index} of worker {begin.sender} goes on at element {start}, not {came}"
            )
        before = self.order[: self.order.index(begin.sender)]
        if came > done or any(self._progress(worker, index) < stop for worker in before):
            return Wait()
        return Add(done, stop, first=all(self._absent(worker, index) for worker in before))

    def added(self, begin: Begin, index: int, stop: int) -> list[Instruction]:
        """Elements up to `stop` of the worker's gradient are in the sum."""
        self._sums.setdefault(index, {})[begin.sender] = stop
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
        exchanges = self._exchanges_of(step)
        own = exchanges.own(exchange) if exchanges else None
        return own if own and own.generation == self.promised else None

    def repeat(self) -> list[Instruction]:
        """What to send again while the own report has not led to a commit."""
        return self._exchanges.repeat() if self.opened and self._exchanges else []

    def applied(self, index: int) -> None:
        """The slice has taken the step it owed; after the last one the next is collected."""
        self.versions[index] = self._step
        self._owed.discard(index)
        if not self._owed:
            self._collect(self._step + 1)

    @property
    def owed(self) -> frozenset[int]:
        """Slices that have not yet taken the newest decided step."""
        return frozenset(self._owed)

    def owes(self, index: int) -> bool:
        """Whether the slice is to take the newest decided step now; not while frozen (S1)."""
        return index in self._owed and self._plan is not None

    def squared_sum(self, step: int) -> float:
        """Of the mean gradient of `step` on this shard alone; known as long as the own report."""
        exchanges = self._exchanges_of(step)
        return exchanges.squared_sum if exchanges else 0.0

    def updates(self, index: int) -> bool:
        """Whether the newest record changes the slice's weights, or only its version."""
        record = self.record
        return (
            record is not None
            and record.outcome is Outcome.APPLY
            and bit(record.present, self.slices[index].parameter)
        )

    # --- inside ---------------------------------------------------------------------------------

    def _forget(self, entry: Entry) -> None:
        """Drops everything: the job begins anew, as another model."""
        self.slices, self.lineage = cut(entry.spec), 0
        self.record, self.order = None, ()
        self.versions.clear()
        self._collect(0)

    def _collect(self, step: int) -> None:
        """Begins to collect `step` with nothing in the sums."""
        self._step = step
        self._owed.clear()
        self._sums.clear()
        self.begins = {}
        self._last, self._exchanges = self._exchanges, None

    def _exchanging(self) -> Exchanges:
        """The exchanges of the step that is collected; begun when its first event comes."""
        if self._exchanges is None:
            assert self._held is not None
            self._exchanges = Exchanges(self.shard, self._step, self.order, self._held)
        return self._exchanges

    def _exchanges_of(self, step: int) -> Exchanges | None:
        """Those of the step that is collected or owed, or of the one before."""
        for exchanges in (self._exchanges, self._last):
            if exchanges is not None and exchanges.step == step:
                return exchanges
        return None

    def _go_on(self, candidates: Iterable[int]) -> list[Instruction]:
        """Tells the exchanges of sums that are full; of nothing before all pushes have begun."""
        if not self.opened or self._owed or not self._complete():
            return []
        exchanges = self._exchanging()
        if not exchanges.begun:
            begins = [self.begins[worker] for worker in self.order]
            counts = self._step_counts()
            draft = draft_record(self._step, begins, counts)
            exchanges.begin(draft, counts, begins[0].max_grad_norm)
            candidates = self.mine
        full = [index for index in candidates if self._full(index)]
        return self._decided(exchanges.full(full))

    def _decided(self, instructions: list[Instruction]) -> list[Instruction]:
        """Takes over the record that the exchanges have come to, if they have."""
        record = self._exchanges.record if self._exchanges else None
        if record is None:
            return instructions
        self._decide(record)
        return [*instructions, Committed(record)]

    def _complete(self) -> bool:
        """Whether every worker of the round has begun its push."""
        return bool(self.order) and bool(self.mine) and set(self.begins) >= set(self.order)

    @property
    def _unseen(self) -> bool:
        """Whether a step is decided that no slice has taken, so that nobody has heard of it."""
        return bool(self._owed) and self._owed == set(self.versions)

    def _decide(self, record: Record) -> None:
        self._before, self.record = self.record, record
        self._owed = set(self.versions)

    def _full(self, index: int) -> bool:
        return bool(self.order) and all(self._done(worker, index) for worker in self.order)

    def _done(self, worker: str, index: int) -> bool:
        return self._progress(worker, index) == self._count(index)

    def _progress(self, worker: str, index: int) -> int:
        """How many elements of the worker's gradient are in; an absent one is in at once."""
        if worker not in self.begins:
            return 0
        if self._absent(worker, index):
            return self._count(index)
        return self._sums.get(index, {}).get(worker, 0)

    def _absent(self, worker: str, index: int) -> bool:
        begin = self.begins.get(worker)
        return begin is not None and not bit(begin.present, self.slices[index].parameter)

    def _sparse(self, begin: Begin, index: int) -> bool:
        return bit(begin.sparse, self.slices[index].parameter)

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
        """Each parameter's count of updates before the step that is collected."""
        assert self.entry is not None
        if self.record is None:
            return (0,) * len(self.entry.spec.parameters)
        return self.record.step_counts
