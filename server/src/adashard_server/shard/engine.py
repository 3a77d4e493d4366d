"""Carries out, for one job on one shard, what `rounds.py` decides.

There is no compute thread and no queue. Every stream's thread does the work that its own frames
and replies need: it adds its frame into the sum, measures a sum that it has filled, and applies
the step to a slice that it is about to send, unless another thread is at it already. One lock
covers decisions only; adds, sums and updates run outside it, and torch drops the GIL in them.

What keeps two threads off one slice: a slice with work under way is *busy*; whoever wants to
work on it waits. A change of generation waits until nothing is busy.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adashard.wire.errors import InvalidFrame, InvalidRequest, StaleGeneration
from adashard.wire.frames import Extent, cut_runs, data_frame
from adashard.wire.messages import (
    Acknowledge,
    Begin,
    Entry,
    ExchangeRequest,
    ExchangeResponse,
    Frozen,
    Holding,
    Plan,
    Record,
    Report,
    Run,
    Stale,
    StepSummary,
    UploadBegin,
)
from adashard.wire.spec import DType
from adashard.wire.tensors import as_buffer, from_buffer, torch_dtype
from adashard_server.shard.exchange import PeerExchange
from adashard_server.shard.instructions import Add, Committed, Instruction, Measure, Send, Wait
from adashard_server.shard.rounds import Rounds
from adashard_server.shard.slices import SliceStore
from adashard_server.shard.stopwatch import Stopwatch

log = logging.getLogger("adashard.rounds")

Alive = Callable[[], bool]
Check = Callable[[], None]
_LOOK_UP_S = 1.0  # how often a waiting thread looks whether its caller is still there


@dataclass(slots=True)
class _Upload:
    """How many elements of each slice have come, and those of slices that are not whole yet."""

    came: dict[int, int] = field(default_factory=dict)
    torn: dict[int, Tensor] = field(default_factory=dict)


class Engine:
    """One job on one shard. Thread-safe; calls of a stream block until it is their turn."""

    def __init__(
        self,
        job: str,
        shard: str,
        device: torch.device,
        exchange: PeerExchange,
        clock: Callable[[], float],
        summarize: Callable[[StepSummary], None],
    ) -> None:
        self.job = job
        self._rounds = Rounds(shard)
        self._device = device
        self._exchange = exchange
        self._clock = clock
        self._summarize = summarize
        self._stopwatch = Stopwatch(job, clock)
        self._store: SliceStore | None = None
        self._busy: set[int] = set()
        self._streams: dict[str, Begin] = {}
        self._turn = threading.Condition()

    # --- a change of generation -----------------------------------------------------------------

    def freeze(self, entry: Entry) -> Frozen | Stale:
        """Promises a generation; returns when no slice is being worked on (S1)."""
        with self._turn:
            spec = self._rounds.entry.spec if self._rounds.entry else None
            answer = self._rounds.freeze(entry)
            if isinstance(answer, Stale):
                return answer
            self._streams.clear()
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
        self._settle_all(lambda: self._rounds.check_promised(plan.entry.generation))
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

    def upload(self, begin: UploadBegin, alive: Alive) -> _Upload:
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
            return _Upload()

    def upload_piece(
        self, upload: _Upload, begin: UploadBegin, run: Run, buffer: memoryview
    ) -> bool:
        """Takes elements of a slice, in order; whether all placed here are at their target now.

        A slice changes as a whole, once: an upload that breaks off, or is repeated, tears nothing.

        Raises:
            StaleGeneration: another generation is promised, or it is open already.
            InvalidFrame: the elements do not go on where the ones before ended.
        """
        with self._turn:
            self._check_upload(begin)
            count = self._element_count(run.slice)
            came = upload.came.get(run.slice, 0)
            if run.start != came or came + run.count > count:
                raise InvalidFrame(f"slice {run.slice} goes on at element {came}, not {run.start}")
            upload.came[run.slice] = came = came + run.count
            if self._rounds.lacks(run.slice, begin.version):
                if run.slice not in upload.torn:
                    upload.torn[run.slice] = torch.empty(
                        count, dtype=torch.float32, device=self._device
                    )
                weight = upload.torn[run.slice]
                weight[run.start : came].copy_(from_buffer(buffer, run.dtype))
                if came == count:
                    self._held().put(run.slice, upload.torn.pop(run.slice))
                    self._rounds.uploaded(run.slice, begin.version)
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
            self._settle_all(lambda: self._rounds.check(begin.generation, begin.sender))
        with self._turn:
            acknowledge, instructions = self._rounds.begin(begin)
            self._streams[begin.sender] = begin
            if begin.push and not acknowledge.complete:
                self._stopwatch.began(begin.step)
            self._turn.notify_all()
        self._carry_out(instructions)
        return acknowledge

    def push(self, begin: Begin, run: Run, buffer: memoryview, alive: Alive) -> None:
        """Adds a run of a gradient into its slice's sum, when it is this worker's turn.

        Raises:
            StaleGeneration: the generation or the stream has ended meanwhile.
            InvalidFrame: the run is not one that may come now.
        """
        with self._turn:
            admission = self._admit(begin, run)
            while isinstance(admission, Wait) or (admission and run.slice in self._busy):
                self._wait(alive)
                admission = self._admit(begin, run)
            if not isinstance(admission, Add):
                return
            self._busy.add(run.slice)
            self._stopwatch.received(begin.step, buffer.nbytes)
        with self._working_on(run.slice):
            skip = admission.start - run.start
            addend = from_buffer(buffer, run.dtype)[skip:]
            self._held().add(
                run.slice, admission.start, addend, share=begin.share, first=admission.first
            )
            with self._turn:
                instructions = self._rounds.added(begin, run.slice, admission.stop)
        self._carry_out(instructions)

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
            yield data_frame([_whole_already(index) for index in unchanged], [])
        for runs in cut_runs(self._extents(begin, wanted, alive)):
            frame = data_frame(runs, [self._elements(run) for run in runs])
            with self._turn:
                self._check_stream(begin)  # else an update may have run into what was copied
                self._stopwatch.sent(begin.step, len(frame))
            yield frame
        with self._turn:
            summary = self._stopwatch.replied(begin.step)
        if summary is not None:
            self._summarize(summary)

    def exchange(self, request: ExchangeRequest) -> ExchangeResponse:
        """Takes another shard's report; answers with the own one where it is wanted and there.

        Raises:
            StaleGeneration: the report is of another generation.
        """
        self._deliver(request.report)
        with self._turn:
            own = self._rounds.own_report(request.report.step) if request.wanted else None
        return ExchangeResponse(report=own)

    def repeat(self) -> None:
        """Sends again what has not been answered; to be called now and then."""
        with self._turn:
            instructions = self._rounds.repeat()
        self._carry_out(instructions)

    # --- what people see ------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The newest step that is decided here."""
        with self._turn:
            return self._rounds.version

    @property
    def generation(self) -> int:
        """The generation that is promised."""
        return self._rounds.promised

    @property
    def collecting(self) -> bool:
        """Whether a round is under way: some gradient is here and its step not yet decided."""
        with self._turn:
            return bool(self._rounds.begins) or bool(self._rounds.owed)

    def holding(self) -> Holding:
        """Bytes of this job on this shard."""
        with self._turn:
            store = self._store
            if store is None:
                return Holding(job=self.job, weight_bytes=0)
            return Holding(
                job=self.job, weight_bytes=store.weight_bytes(), state_bytes=store.state_bytes()
            )

    # --- inside ---------------------------------------------------------------------------------

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        """Does what the rounds say, without the lock; what that leads to as well."""
        todo = list(instructions)
        while todo:
            instruction = todo.pop(0)
            if isinstance(instruction, Measure):
                for index in instruction.slices:
                    todo += self._measure(index)
            elif isinstance(instruction, Send):
                self._send(instruction)
            elif isinstance(instruction, Committed):
                self._committed(instruction.record)

    def _measure(self, index: int) -> list[Instruction]:
        """Takes the squared sum of a slice, while nobody adds to it."""
        with self._turn:
            self._turn.wait_for(lambda: index not in self._busy)
            self._busy.add(index)
        with self._working_on(index):
            squared = self._held().squared_sum(index)
            with self._turn:
                return self._rounds.measured({index: squared})

    def _send(self, send: Send) -> None:
        with self._turn:
            entry = self._rounds.entry
            self._stopwatch.reported(send.report.step)
        assert entry is not None
        members = {member.id: member for member in entry.shards}
        for peer in send.peers:
            request = ExchangeRequest(receiver=peer, report=send.report, wanted=peer in send.wanted)
            self._exchange.send(members[peer], request, self._deliver_quietly)

    def _deliver(self, report: Report) -> None:
        with self._turn:
            instructions = self._rounds.exchange(report)
        self._carry_out(instructions)

    def _deliver_quietly(self, report: Report) -> None:
        try:
            self._deliver(report)
        except StaleGeneration:
            log.debug("a report of generation %d came too late", report.generation)
        except InvalidRequest as error:
            log.warning("%s", error.message)

    def _committed(self, record: Record) -> None:
        with self._turn:
            own = self._rounds.own_report(record.step)
            squared_sum = sum(own.squared_sums) if own else 0.0
            summary = self._stopwatch.committed(record, squared_sum)
            self._turn.notify_all()
        if summary is not None:
            self._summarize(summary)

    def _settle_all(self, check: Check) -> None:
        for index in sorted(self._rounds.owed):
            self._settle(index, check)

    def _settle(self, index: int, check: Check, alive: Alive = lambda: True) -> None:
        """Has the slice take the step it owes, here or in the thread that is at it already.

        Args:
            index: the slice.
            check: raises where the caller's generation has ended: after a freeze has been answered
                nothing changes until the plan says so.
            alive: whether the caller is still there.
        """
        with self._turn:
            while index in self._busy:
                self._wait(alive)
            check()
            if not self._rounds.owes(index):
                return
            record, updates = self._rounds.record, self._rounds.updates(index)
            assert record is not None
            self._busy.add(index)
        with self._working_on(index):
            began = self._clock()
            measures = self._held().apply(index, record) if updates else None
            with self._turn:
                spent_s, count = self._clock() - began, self._element_count(index)
                self._stopwatch.applied(record.step, measures, count, spent_s)
                self._rounds.applied(index)

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
        return self._rounds.admit(begin, run.slice, run.start, run.count)

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
            self._settle(index, lambda: self._check_stream(begin))
        return unchanged, [index for index in wanted if index not in set(unchanged)]

    def _asked_for(self, begin: Begin, index: int) -> bool:
        return not begin.slices or index in begin.slices

    def _extents(self, begin: Begin, indices: list[int], alive: Alive) -> Iterator[Extent]:
        """Each slice once it has taken the step, with the format of its reply."""
        for index in indices:
            self._settle(index, lambda: self._check_stream(begin), alive)
            piece = self._rounds.slices[index]
            dtype = begin.dtypes[piece.parameter if len(begin.dtypes) > 1 else 0]
            row = piece.shape[-1] if piece.shape else 1
            yield Extent(index, piece.element_count, row, dtype)

    def _elements(self, run: Run) -> memoryview:
        weight = self._held().weight(run.slice)[run.start : run.start + run.count]
        return as_buffer(_rounded(weight, run.dtype))

    def _element_count(self, index: int) -> int:
        slices = self._rounds.slices
        if not 0 <= index < len(slices):
            raise InvalidFrame(f"there is no slice {index}; the job has {len(slices)}")
        return slices[index].element_count

    def _held(self) -> SliceStore:
        """The store of the newest specification; made when it is first needed."""
        if self._store is None:
            entry = self._rounds.entry
            assert entry is not None
            self._store = SliceStore(entry.spec, self._rounds.slices, self._device)
        return self._store


def _whole_already(index: int) -> Run:
    """Says of a slice that the worker has it at this version, bit for bit."""
    return Run(slice=index, start=0, count=0, dtype=DType.FLOAT32)


def _rounded(weight: Tensor, dtype: DType) -> Tensor:
    """Master weights in the format of a reply, on the CPU; rounded to nearest once."""
    return weight.to("cpu", torch_dtype(dtype))
