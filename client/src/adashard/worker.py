"""A worker's half of the protocol, decided: what it holds, promises and may use. Pure.

The session feeds it from its two threads, under one lock, and carries out what follows
(docs/protocol.md, rules W1 to W8). It holds no tensor, no socket and no clock.

    joining ──freeze──▶ frozen ──open──▶ behind the base: pull it ──▶ computing ──▶ pushing t
                          ▲                                                            │
                          └───────────────── freeze, at any time ◀─────────────────────┘
"""

from __future__ import annotations

from collections.abc import Iterable

from adashard.wire.control import Frozen, Stale, Standing
from adashard.wire.errors import Internal, InvalidFrame, StaleGeneration
from adashard.wire.messages import Entry, Plan, Record, Run
from adashard.wire.placement import Slice, cut
from adashard.wire.spec import JobSpec


class Worker:
    """One worker in one job. Not thread-safe.

    Args:
        worker_id: new for every session.
        job: its name.
        loaded: stands for the steps before the optimizer state that the worker has loaded and
            would begin the job with; None to begin it with fresh state.

    Attributes:
        version: the version of the weights that it holds whole; -1 for none of the job's.
        record: that of the step `version`; None for fresh weights.
        plan: of the open generation; None while frozen.
        entry: the newest generation it has promised.
        slices: of the job, as that generation has it; none before the first.
    """

    def __init__(self, worker_id: str, job: str, loaded: Record | None = None) -> None:
        self.id = worker_id
        self.job = job
        self.slices: tuple[Slice, ...] = ()
        self.promised = 0
        self.version = -1
        self.record: Record | None = None
        self.plan: Plan | None = None
        self.entry: Entry | None = None
        self.leaving = False
        self._loaded = loaded
        self._lineage = 0
        self._fresh = True
        self._versions: list[int] = []
        self._came: dict[int, int] = {}  # elements of slices that are not whole yet
        self._incoming: Record | None = None

    # --- a change of generation -----------------------------------------------------------------

    @property
    def rank(self) -> int | None:
        """Its rank; None before it is part of a generation."""
        workers = self.entry.workers if self.entry else ()
        return next((worker.rank for worker in workers if worker.id == self.id), None)

    def freeze(self, entry: Entry) -> Frozen | Stale:
        """Promises a generation (W2): nothing of an older one is used any more."""
        if entry.generation < self.promised:
            return Stale(job=self.job, promised=self.promised)
        if entry.generation > self.promised:
            if self.entry is None or self.entry.spec != entry.spec:
                self._cut(entry.spec)
            self.promised, self.entry, self.plan = entry.generation, entry, None
            self._become_origin(entry)
        held = tuple(range(len(self.slices))) if self._is_origin(entry) else ()
        return Frozen(
            job=self.job,
            generation=self.promised,
            lineage=self._lineage,
            slices=held,
            versions=tuple(self._versions[index] for index in held),
            record=self.record,
            fresh=self._fresh,
            complete=self.version >= 0,
            leaving=self.leaving,
        )

    def supplies(self, plan: Plan) -> set[int]:
        """The slices that it is to upload for `plan` (W3)."""
        if plan.entry.generation != self.promised:
            return set()
        return {source.slice for source in plan.sources if source.member == self.id}

    def open(self, plan: Plan) -> bool:
        """Goes on with `plan` (W4), if it is that of the promised generation."""
        if plan.entry.generation != self.promised:
            return False
        if self.plan is None:
            number = plan.entry.lineage.number if plan.entry.lineage else 0
            if number != self._lineage:
                self._lineage, self.version, self.record = number, -1, None
                self._versions = [-1] * len(self.slices)
            self.entry, self.plan, self._incoming = plan.entry, plan, None
            self._came.clear()
        return True

    def check(self, generation: int) -> None:
        """Refuses what belongs to a generation that has ended (W6).

        Raises:
            StaleGeneration: it has.
        """
        if self.plan is None or self.plan.entry.generation != generation:
            raise StaleGeneration(f"generation {generation} has ended for worker {self.id}")

    def standing(self) -> Standing:
        """Where it stands, for a renewal (W1)."""
        return Standing(
            job=self.job,
            generation=self.promised,
            version=self.version,
            leaving=self.leaving,
        )

    def _cut(self, spec: JobSpec) -> None:
        """What it held was cut in another way, if there was anything."""
        self.slices = cut(spec)
        self._lineage, self.version, self.record = 0, -1, None
        self._versions = [-1] * len(self.slices)

    def _become_origin(self, entry: Entry) -> None:
        """Where the lineage names this worker, what it begins with is the first version."""
        lineage = entry.lineage
        if lineage is not None and lineage.origin == self.id and self._fresh:
            self._lineage, self._fresh = lineage.number, False
            self.version, self.record = lineage.base_version, self._loaded
            self._versions = [lineage.base_version] * len(self.slices)

    def _is_origin(self, entry: Entry) -> bool:
        lineage = entry.lineage
        return (
            lineage is not None
            and lineage.origin == self.id
            and (self._lineage, self.version) == (lineage.number, lineage.base_version)
        )

    # --- a step ---------------------------------------------------------------------------------

    def behind(self, indices: Iterable[int], step: int) -> list[int]:
        """Those of the slices that are not yet at `step`."""
        return [index for index in indices if self._versions[index] != step]

    def held(self, indices: Iterable[int]) -> int:
        """The version that it holds of all these slices; -1 if one of them is torn."""
        return min(self._versions[index] for index in indices)

    def step_counts(self) -> tuple[int, ...]:
        """Each parameter's count of updates, at `version`."""
        count = len(self.entry.spec.parameters) if self.entry else 0
        return self.record.step_counts if self.record else (0,) * count

    def take_record(self, record: Record, step: int) -> None:
        """The record of `step` has come, from one shard or another.

        Raises:
            InvalidFrame: it is the record of another step.
            Internal: another shard has sent another one; nobody can say which is right.
        """
        if record.step != step:
            raise InvalidFrame(f"the record of step {record.step} came in a reply for {step}")
        known = self._incoming
        if known is not None and known.step == step and known != record:
            raise Internal(f"two shards of job {self.job!r} have different records of step {step}")
        self._incoming = record

    def writes(self, run: Run) -> None:
        """Elements are about to be written: the slice is torn until it is whole (W6).

        Raises:
            InvalidFrame: they do not go on where the ones before ended, or a slice that is not
                whole is said to be unchanged.
        """
        if not 0 <= run.slice < len(self.slices):
            raise InvalidFrame(f"there is no slice {run.slice}; the job has {len(self.slices)}")
        if run.count == 0 and self._versions[run.slice] < 0:
            raise InvalidFrame(f"slice {run.slice} is said to be unchanged, and is not whole here")
        if run.count == 0:
            return
        came = 0 if run.start == 0 else self._came.get(run.slice, 0)
        if run.start != came or run.start + run.count > self.slices[run.slice].element_count:
            raise InvalidFrame(f"a reply goes on at element {came}, not so: {run}")
        self._versions[run.slice], self._fresh = -1, False
        self._came[run.slice] = came + run.count

    def wrote(self, run: Run, step: int) -> None:
        """They are written; a slice that is whole now, or was all the time, is at `step`."""
        if run.count == 0 or self._came[run.slice] == self.slices[run.slice].element_count:
            self._came.pop(run.slice, None)
            self._versions[run.slice] = step

    def took(self, plan: Plan, step: int) -> None:
        """All slices are at `step`: the gradient may go, the record stays until the next.

        Raises:
            StaleGeneration: the generation has ended, and the next decides.
        """
        self.check(plan.entry.generation)
        incoming = self._incoming
        if incoming is not None and incoming.step == step:
            self.record = incoming
        elif plan.base == step:  # all replies had come before an older generation ended
            self.record = plan.record
        self.version, self._fresh = step, False
