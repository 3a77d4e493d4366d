"""A worker's half of the protocol, decided: what it holds, promises and may use. Pure.

The session feeds it from its two threads, under one lock, and carries out what follows
(docs/protocol.md, rules W1 to W8). It holds no tensor, no socket and no clock: what there is of a
slice beside its version is in `copies.py`, and is replaced together with it.

    joining ──freeze──▶ frozen ──open──▶ behind the base: pull it ──▶ computing ──▶ pushing t
                          ▲                                                            │
                          └───────────────── freeze, at any time ◀─────────────────────┘
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from adashard.wire.control import Frozen, Stale, Standing
from adashard.wire.errors import Internal, InvalidFrame, StaleGeneration
from adashard.wire.messages import Entry, Outcome, Plan, Record
from adashard.wire.placement import Slice, cut
from adashard.wire.spec import JobSpec, Recovery


class Worker:
    """One worker in one job. Not thread-safe.

    Args:
        worker_id: new for every session.
        job: its name.
        loaded: stands for the steps before the optimizer state that the worker has loaded and
            would begin the job with; None to begin it with fresh state.

    Attributes:
        version: the newest at which it has held every slice; -1 for none of the job's.
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
        self._copies: set[int] = set()  # slices of which the state is here with the weights
        self._incoming: Record | None = None  # of the step that is being taken

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
        held = tuple(sorted(self._copies))
        return Frozen(
            job=self.job,
            generation=self.promised,
            lineage=self._lineage,
            slices=held,
            versions=tuple(self._versions[index] for index in held),
            record=self._record_of(max(self._versions, default=-1)),
            fresh=self._fresh,
            complete=self.version >= 0,
            leaving=self.leaving,
        )

    @property
    def applied(self) -> bool:
        """Whether the step `version` changed weights."""
        return self.record is not None and self.record.outcome is Outcome.APPLY

    def supplies(self, plan: Plan) -> dict[int, int]:
        """The slices that it is to upload for `plan` and holds, with their versions (W3)."""
        return {index: version for index, version in self._named(plan) if self._has(index, version)}

    def misses(self, plan: Plan) -> bool:
        """Whether `plan` counts on a copy that is not here any more.

        The answer to it is that to the freeze once more: with what is here now.
        """
        return any(not self._has(index, version) for index, version in self._named(plan))

    def changed(self, index: int) -> None:
        """Something else than the job has written the slice's weights: they are no copy (W3)."""
        self._versions[index], self._fresh = -1, False
        self._copies.discard(index)

    def open(self, plan: Plan) -> bool:
        """Goes on with `plan` (W4), if it is that of the promised generation."""
        if plan.entry.generation != self.promised:
            return False
        if self.plan is None:
            number = plan.entry.lineage.number if plan.entry.lineage else 0
            if number != self._lineage:
                self._drop(number)
            self.entry, self.plan, self._incoming = plan.entry, plan, plan.record
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
        self._drop(0)

    def _drop(self, lineage: int) -> None:
        """Begins a lineage with nothing."""
        self._lineage, self.version, self.record = lineage, -1, None
        self._versions = [-1] * len(self.slices)
        self._copies.clear()

    def _become_origin(self, entry: Entry) -> None:
        """Where the lineage names this worker, what it begins with is the first version.

        It may be asked again, where nobody has come as far as to open the lineage.
        """
        lineage = entry.lineage
        named = lineage is not None and lineage.origin == self.id
        if lineage is not None and named and self._fresh and lineage.number != self._lineage:
            self._lineage = lineage.number
            self.version, self.record = lineage.base_version, self._loaded
            self._versions = [lineage.base_version] * len(self.slices)
            self._copies = set(range(len(self.slices)))

    def _record_of(self, version: int) -> Record | None:
        """The record of the highest version that it holds; that of a step not taken is nothing."""
        known = (self._incoming, self.record)
        return next((one for one in known if one is not None and one.step == version), None)

    def _named(self, plan: Plan) -> Iterator[tuple[int, int]]:
        """What a plan that is not open yet wants of this worker: slices, and which version."""
        if plan.entry.generation == self.promised and self.plan is None:
            for source in plan.sources:
                if source.member == self.id:
                    yield source.slice, source.version

    @property
    def _with_state(self) -> bool:
        """Whether replies bring state, so that what has come is a copy."""
        return self.entry is not None and self.entry.spec.recovery is Recovery.WORKERS

    def _has(self, index: int, version: int) -> bool:
        return index in self._copies and self._versions[index] == version

    # --- a step ---------------------------------------------------------------------------------

    def behind(self, indices: Iterable[int], step: int) -> list[int]:
        """Those of the slices that are not yet at `step`."""
        return [index for index in indices if self._versions[index] != step]

    def held(self, indices: Iterable[int]) -> int:
        """The version of the oldest of these slices; -1 if one is not here."""
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

    def arrived(self, index: int, step: int, *, unchanged: bool = False) -> None:
        """A whole slice is at `step`: weights and state have been replaced as one (W6).

        Args:
            index: the slice.
            step: its version.
            unchanged: whether nothing has come, as it is what it was.

        Raises:
            InvalidFrame: there is no such slice, or none of the version before.
        """
        if not 0 <= index < len(self.slices):
            raise InvalidFrame(f"there is no slice {index}; the job has {len(self.slices)}")
        before = self._versions[index]
        if unchanged and (before < 0 or before not in (step - 1, step)):
            raise InvalidFrame(
                f"slice {index} is said to be unchanged in step {step}, and is at {before} here"
            )
        self._versions[index] = step
        if not unchanged:
            self._fresh = False
        if not self._with_state:
            self._copies.discard(index)
        elif not unchanged:
            self._copies.add(index)

    def owes(self, plan: Plan, indices: Iterable[int], step: int) -> list[int]:
        """Those of the slices whose gradient of `step` may be wanted by their shard (W4).

        In a step that is decided these are the slices that nobody has at it, if this worker has
        taken part in it.
        """
        behind = self.behind(indices, step)
        if step > plan.base:
            return behind
        taken = plan.record is not None and self.id in plan.record.workers
        return [index for index in behind if taken and index in plan.behind]

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
