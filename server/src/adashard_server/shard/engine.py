"""Carries out, for one job on one shard, what `rounds.py` decides.

There is no compute thread. Every stream's thread does the work that its own frames and replies
need: it adds its frame into the sum, and those of others that have waited for it; it measures a
sum that it has filled, and applies the step to a slice that it is about to send, unless another
thread is at it already. One lock covers decisions only; adds, sums and updates run outside it,
and drop the GIL.

What keeps two threads off one slice: a slice with work under way is *busy*; whoever wants to
work on it waits. A change of generation waits until nothing is busy.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from adashard import failpoints
from adashard.wire.checksums import RunningChecksums
from adashard.wire.control import Frozen, Happened, Holding, Stale, StepSummary
from adashard.wire.errors import InvalidFrame, StaleGeneration
from adashard.wire.frames import Extent, cut_runs, data_frame
from adashard.wire.messages import (
    Acknowledge,
    Begin,
    Content,
    Entry,
    Plan,
    Record,
    Run,
    UploadBegin,
)
from adashard.wire.tensors import addend_from, without_first
from adashard_server.shard.early import EarlyRun, EarlyRuns
from adashard_server.shard.events import degraded
from adashard_server.shard.exchange import PeerExchange
from adashard_server.shard.instructions import (
    Add,
    Committed,
    Degraded,
    Instruction,
    Measure,
    Refuse,
    Send,
    Wait,
)
from adashard_server.shard.replies import elements, extents, whole_already
from adashard_server.shard.reports import Reports
from adashard_server.shard.rounds import Rounds
from adashard_server.shard.slices import SliceStore
from adashard_server.shard.snapshots import Snapshots
from adashard_server.shard.stopwatch import Stopwatch
from adashard_server.shard.storing import Storage, from_checkpoint, stored_slices
from adashard_server.shard.uploads import Upload

log = logging.getLogger("adashard.rounds")

Alive = Callable[[], bool]
_LOOK_UP_S = 1.0  # how often a waiting thread looks whether its caller is still there


class Engine:
    """One job on one shard. Thread-safe; calls of a stream block until it is their turn."""

    def __init__(
        self,
        job: str,
        shard: str,
        device: torch.device,
        exchange: PeerExchange,
        clock: Callable[[], float],
        tell: Callable[[StepSummary | Happened], None],
        storage: Storage,
    ) -> None:
        self.job = job
        self._rounds = Rounds(shard)
        self._device = device
        self._clock = clock
        self._tell = tell
        self._stopwatch = Stopwatch(job, clock)
        self._store: SliceStore | None = None
        self._busy: set[int] = set()
        self._streams: dict[str, Begin] = {}
        self._early = EarlyRuns()
        self._turn = threading.Condition()
        self.reports = Reports(self._rounds, self._turn, exchange, self._stopwatch, self._carry_out)
        self._storage = storage
        self.snapshots = Snapshots(self._rounds, storage, self._turn, clock, self._copy)

    # --- a change of generation -----------------------------------------------------------------

    def freeze(self, entry: Entry) -> Frozen | Stale:
        """Promises a generation; returns when no slice is being worked on (S1)."""
        with self._turn:
            spec = self._rounds.entry.spec if self._rounds.entry else None
            answer = self._rounds.freeze(entry)
            if isinstance(answer, Stale):
                return answer
            self._streams.clear()
            self._early.clear()
            self.snapshots.void()
            self._turn.notify_all()
            self._turn.wait_for(lambda: not self._busy)
            if spec != entry.spec:
                self._store = None
            return self._rounds.freeze(entry)

    def plan(self, plan: Plan) -> bool:
        """Brings slices to where `plan` says (S2); whether all placed here are there.

        Raises:
            StaleGeneration: another generation is promised.
        """
        with self._turn:
            self._rounds.plan(plan)
            self._turn.notify_all()
        self._settle_all()
        self._restore(plan)
        with self._turn:
            return self._rounds.planned

    def open(self, plan: Plan) -> None:
        """Goes on from `plan` (S3).

        Raises:
            StaleGeneration: another generation is promised.
        """
        with self._turn:
            instructions = self._rounds.open(plan)
            self._held().keep(frozenset(self._rounds.versions))
            self._turn.notify_all()
        self._carry_out(instructions)

    def upload(self, begin: UploadBegin, alive: Alive) -> Upload:
        """Begins to take whole slices from the source that the plan names.

        The source may have its plan before this shard has: what came before the plan would be
        dropped with the copies of other lineages, so it waits.

        Raises:
            StaleGeneration: another generation is promised, or it is open already.
        """
        with self._turn:
            while not self._rounds.has_plan(begin.generation):
                self._check_upload(begin)
                self._wait(alive)
            self._check_upload(begin)
            return Upload(begin, self._shapes, self._device)

    def upload_piece(self, upload: Upload, run: Run, buffer: memoryview) -> bool:
        """Takes elements of a slice; whether all placed here are at their target now.

        Raises:
            StaleGeneration: another generation is promised, or it is open already.
            InvalidFrame: the elements are not those that come next.
        """
        begin = upload.begin
        with self._turn:
            self._check_upload(begin)
            contents = upload.take(run, buffer)
            if contents is not None:
                self._take(run.slice, begin.version, contents)
            return self._rounds.planned

    # --- a step ---------------------------------------------------------------------------------

    def begin(self, begin: Begin) -> Acknowledge:
        """A worker wants a step, with or without a push for it.

        A new stream of a worker ends the one before it.

        Raises:
            StaleGeneration: of another generation, or frozen.
            InvalidRequest: the worker cannot be at that step, or the push does not fit the job.
        """
        if begin.push and begin.step == self.version + 1:
            self._settle_all()
        with self._turn:
            undecided = begin.step > self._rounds.version
            acknowledge, instructions = self._rounds.begin(begin)
            self._streams[begin.sender] = begin
            self._early.drop(begin.sender)
            if begin.push and undecided:
                self._stopwatch.began(begin.step)
            self._turn.notify_all()
            waited_for = self._early.slices  # by a worker that turns out to have no gradient there
        self._carry_out(instructions)
        for index in waited_for:
            self._add_early(index)
        return acknowledge

    def push(self, begin: Begin, run: Run, buffer: memoryview, alive: Alive) -> None:
        """Adds a run of a gradient into its slice's sum, when it is this worker's turn.

        Raises:
            StaleGeneration: the generation or the stream has ended meanwhile.
            InvalidFrame: the run is not one that may come now.
        """
        if run.content is not Content.WEIGHT:
            raise InvalidFrame(f"a push carries no {run.content.name.lower()}")
        with self._turn:
            admission = self._admit(begin, run)
            while isinstance(admission, Wait) or (admission and run.slice in self._busy):
                if isinstance(admission, Wait) and self._early.put(begin, run, buffer):
                    return
                self._wait(alive)
                admission = self._admit(begin, run)
            if not isinstance(admission, Add):
                return
            self._busy.add(run.slice)
        self._add(begin, run, addend_from(buffer, run.dtype), admission)
        self._add_early(run.slice)

    def wait_decided(self, begin: Begin, alive: Alive) -> Record | None:
        """Waits until the step of `begin` is decided; its record (None for a job's first version).

        Raises:
            StaleGeneration: the generation or the stream has ended meanwhile.
        """
        with self._turn:
            self._check_stream(begin)
            self._stopwatch.pushed(begin.step)
            while self._rounds.version < begin.step:
                self._wait(alive)
                self._check_stream(begin)
            return self._rounds.record

    def reply(self, begin: Begin, alive: Alive) -> Iterator[bytes]:
        """The frames of the weights at `begin.step`, each slice as soon as it has taken the step.

        Raises:
            StaleGeneration: the generation or the stream has ended meanwhile.
        """
        unchanged, wanted = self._wanted(begin)
        if unchanged:
            with self._turn:
                self._check_stream(begin)  # else a freeze may have undone what is said here
            yield data_frame([whole_already(index) for index in unchanged], [])
        checksums = RunningChecksums()
        for runs in cut_runs(self._extents(begin, wanted, alive)):
            parts = [elements(self._held(), run, begin) for run in runs]
            frame = data_frame(runs, parts, checksums)
            with self._turn:
                self._check_stream(begin)  # else an update may have run into what was copied
                self._stopwatch.sent(begin.step, len(frame))
            yield frame
        with self._turn:
            summary = self._stopwatch.replied(begin.step)
        if summary is not None:
            self._tell(summary)

    # --- what people see ------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The newest step that is decided here."""
        with self._turn:
            return self._rounds.version

    @property
    def entry(self) -> Entry | None:
        """The newest that it has promised; None before the first."""
        with self._turn:
            entry = self._rounds.entry
            return entry and replace(entry, opened=entry.opened or self._rounds.opened)

    @property
    def generation(self) -> int:
        """The generation that is promised."""
        return self._rounds.promised

    @property
    def collecting(self) -> bool:
        """Whether a round is under way: some gradient is here and its step not yet decided."""
        with self._turn:
            return bool(self._rounds.sums.begins) or bool(self._rounds.owed)

    def holding(self) -> Holding:
        """Bytes of this job on this shard."""
        with self._turn:
            store = self._store
            return Holding(
                job=self.job,
                weight_bytes=store.weight_bytes() if store else 0,
                state_bytes=store.state_bytes() if store else {},
                refused_report_count=self.reports.refused_count,
            )

    # --- inside ---------------------------------------------------------------------------------

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        """Does what the rounds say, without the lock; what that leads to as well."""
        todo = list(instructions)
        while todo:
            instruction = todo.pop(0)
            if isinstance(instruction, Measure):
                for index in instruction.slices:
                    todo += self._measure(index, instruction)
            elif isinstance(instruction, Send):
                self.reports.send(instruction)
            elif isinstance(instruction, Refuse):
                why = f"a report of {instruction.sender} was refused: {instruction.why}"
                self.reports.refuse(f"job {self.job!r}: {why}")
            elif isinstance(instruction, Committed):
                self._committed(instruction)
            elif isinstance(instruction, Degraded):
                assert self._rounds.entry is not None
                self._tell(degraded(self._rounds.entry, self._rounds.shard, instruction))

    def _add(self, begin: Begin, run: Run, addend: Tensor, add: Add) -> None:
        """Adds a run that is admitted into the sum of its slice, which is busy."""
        gap, skip = max(0, run.start - add.start), max(0, add.start - run.start)
        with self._working_on(run.slice):
            self._held().add(
                run.slice,
                add.start,
                gap,
                without_first(addend, skip),
                share=begin.share,
                first=add.first,
            )
            with self._turn:
                self._stopwatch.received(begin.step, addend.nbytes)
                self._early.added(begin.sender, run.slice, add.stop)
                instructions = self._rounds.added(begin, run.slice, add.stop)
        self._carry_out(instructions)

    def _add_early(self, index: int) -> None:
        """Adds what has waited for the slice, as far as it is its turn now."""
        while (admitted := self._next_early(index)) is not None:
            early, add = admitted
            self._add(early.begin, early.run, early.addend, add)

    def _next_early(self, index: int) -> tuple[EarlyRun, Add] | None:
        """A run whose turn it is; it waits until it is in the sum, so that none is missing."""
        with self._turn:
            if index in self._busy:
                return None  # whoever works on it looks again
            for early in self._early.first(index):
                run = early.run
                admission = self._rounds.admit(early.begin, run.slice, run.start, run.count)
                if isinstance(admission, Add):
                    self._busy.add(index)
                    return early, admission
        return None

    def _measure(self, index: int, measure: Measure) -> list[Instruction]:
        """Has a slice find out what an exchange needs, while nobody adds to it."""
        with self._turn:
            self._turn.wait_for(lambda: index not in self._busy)
            if not self._rounds.wants(measure):
                return []  # the generation has changed, and the slice may be elsewhere
            self._busy.add(index)
        with self._working_on(index):
            finding = self._held().measure(index, measure.exchange, measure.draft)
            with self._turn:
                return self._rounds.measured(measure, {index: finding})

    def _committed(self, committed: Committed) -> None:
        failpoints.reach("commit")
        with self._turn:
            self.snapshots.committed(committed.record)
            summary = self._stopwatch.committed(
                committed.record, committed.squared_sum, committed.poison
            )
            self._turn.notify_all()
        if summary is not None:
            self._tell(summary)

    def _settle_all(self) -> None:
        for index in self._rounds.payable:
            self._settle(index)

    def _settle(self, index: int, alive: Alive = lambda: True) -> None:
        """Has the slice take the step it owes, here or in the thread that is at it already.

        Between a freeze and its plan it owes nothing, and nothing is done. Where gradients for it
        are still on their way, it waits for them.
        """
        with self._turn:
            while index in self._busy or self._rounds.awaits(index):
                self._wait(alive)
            if not self._rounds.owes(index):
                return
            record, updates = self._rounds.record_for(index), self._rounds.updates(index)
            self._busy.add(index)
        with self._working_on(index):
            self.snapshots.take(index, record.step - 1, self._held())
            began = self._clock()
            measures = self._held().apply(index, record) if updates else None
            with self._turn:
                spent_s, count = self._clock() - began, self._rounds.slices[index].element_count
                self._stopwatch.applied(record.step, measures, count, spent_s)
                self._rounds.applied(index)
        failpoints.reach("apply")

    def _copy(self, index: int, alive: Alive) -> None:
        """Has a snapshot take a slice as it is after the newest decided step (S9)."""
        self._settle(index, alive)
        with self._turn:
            while index in self._busy:
                self._wait(alive)
            version = self._rounds.versions.get(index, -1)
            self._busy.add(index)
        with self._working_on(index):
            self.snapshots.take(index, version, self._held())

    def _restore(self, plan: Plan) -> None:
        """Reads the slices that the lineage's checkpoint supplies (S2)."""
        with self._turn:
            wanted = from_checkpoint(plan, self._rounds, self._shapes)
        for index, version, contents in stored_slices(self._storage, plan, wanted, self._device):
            with self._turn:
                self._rounds.check_promised(plan.entry.generation)
                self._take(index, version, contents)

    def _take(self, index: int, version: int, contents: Mapping[Content, Tensor]) -> None:
        """Takes a whole slice, if it is not here as it is meant to be; the lock must be held."""
        if self._rounds.lacks(index, version):
            self._held().put(index, contents)
            self._rounds.uploaded(index, version)

    @contextmanager
    def _working_on(self, index: int) -> Iterator[None]:
        try:
            yield
        finally:
            with self._turn:
                self._busy.discard(index)
                self._turn.notify_all()

    def _wait(self, alive: Alive) -> None:
        """Waits for a change; the lock must be held."""
        if not self._turn.wait(_LOOK_UP_S) and not alive():
            raise StaleGeneration("the caller has gone away")

    def _admit(self, begin: Begin, run: Run) -> Add | Wait | None:
        self._check_stream(begin)
        ahead = self._early.ahead(begin.sender, run.slice)
        return self._rounds.admit(begin, run.slice, run.start, run.count, ahead=ahead)

    def _check_stream(self, begin: Begin) -> None:
        self._rounds.check(begin.generation, begin.sender)
        if self._streams.get(begin.sender) is not begin:
            raise StaleGeneration(f"a newer stream of worker {begin.sender} has taken over")

    def _check_upload(self, begin: UploadBegin) -> None:
        if begin.generation != self._rounds.promised or self._rounds.opened:
            raise StaleGeneration(
                f"an upload of generation {begin.generation} came at {self._rounds.promised}"
            )

    def _wanted(self, begin: Begin) -> tuple[list[int], list[int]]:
        """Slices that the worker has already at this version, and those to be sent."""
        with self._turn:
            self._check_stream(begin)
            wanted = [index for index in self._rounds.mine if self._asked_for(begin, index)]
            if begin.version < 0 or begin.version != begin.step - 1:
                return [], wanted
            unchanged = [index for index in wanted if not self._rounds.updates(index)]
        for index in unchanged:
            self._settle(index)
        return unchanged, [index for index in wanted if index not in set(unchanged)]

    def _asked_for(self, begin: Begin, index: int) -> bool:
        return not begin.slices or index in begin.slices

    def _extents(self, begin: Begin, indices: list[int], alive: Alive) -> Iterator[Extent]:
        """Each slice once it has taken the step, with the format of its reply; then its state."""
        for index in indices:
            self._settle(index, alive)
            yield from extents(self._held(), self._rounds.slices[index], begin)

    def _shapes(self, index: int) -> dict[Content, tuple[int, ...]]:
        """Shapes of what a slice consists of, its weights first."""
        if not 0 <= index < len(self._rounds.slices):
            raise InvalidFrame(f"there is no slice {index}; the job has {len(self._rounds.slices)}")
        return self._held().shapes(index)

    def _held(self) -> SliceStore:
        """The store of the newest specification; made when it is first needed."""
        if self._store is None:
            entry = self._rounds.entry
            assert entry is not None
            self._store = SliceStore(entry.spec, self._rounds.slices, self._device)
        return self._store
