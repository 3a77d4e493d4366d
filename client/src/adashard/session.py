"""One worker's taking part in one job, from join to leave.

The training loop's thread takes steps; a thread of the control stream answers freeze, plan and
open at any time, also during forward and backward (docs/protocol.md, rules W1 to W8). What the
two share is small and under one lock: the generation that is promised, whether it is open, the
version of every slice, and the streams under way, which a freeze ends.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from torch import Tensor

from adashard.retry import Backoff, repeatable
from adashard.routing import Routing
from adashard.transport.attendance import Attendance
from adashard.transport.base import Call, Transport
from adashard.wire.errors import (
    AdashardError,
    Internal,
    InvalidFrame,
    LeaseExpired,
    ShardUnavailable,
    StaleGeneration,
    from_info,
)
from adashard.wire.frames import Frame, leading_frame, read_frame
from adashard.wire.messages import (
    Acknowledge,
    Begin,
    Bye,
    Entry,
    Freeze,
    FromCoordinator,
    Frozen,
    GroupStep,
    Hello,
    JobSpec,
    Logged,
    Member,
    Notice,
    OnExisting,
    Open,
    Opened,
    Plan,
    PlanRequest,
    Record,
    Renewal,
    Stale,
    Standing,
    UploadBegin,
    Welcome,
    WorkerHello,
)
from adashard.wire.version import VERSION

log = logging.getLogger("adashard")

LEAVE_S = 10.0
STREAM_BUDGET_S = 120.0
_SAY_S = 3.0  # a step that takes longer than this says what it waits for
_RENEW_AFTER_STEP_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """One gradient of the whole model; unchanged until its step is taken.

    Attributes:
        gradients: by parameter index; those without one are absent.
        settings: makes the settings of each group from the parameters' step counts so far.
        share: how much it counts in the mean.
    """

    gradients: Mapping[int, Tensor]
    settings: Callable[[tuple[int, ...]], tuple[GroupStep, ...]]
    share: float = 1.0

    def present(self, count: int) -> bytes:
        """One bit per parameter, least significant first."""
        bits = sum(1 << index for index in self.gradients)
        return bits.to_bytes((count + 7) // 8, "little")


@dataclass(slots=True)
class _Reply:
    """What one step's replies have brought so far; the session's lock covers it."""

    step: int
    record: Record | None = None
    elements: dict[int, int] = field(default_factory=dict)


class Session:
    """A worker in a job. `step`, `log` and `close` belong to one thread, the training loop's.

    Args:
        transport: reaches the servers; closed with the session.
        address: host:port of the coordinator.
        job: its name.
        spec: what the worker believes the job to be.
        parameters: the tensors, in the order of `spec`; written in place during `step`.
        on_existing: what to do when the job exists.
        token: the cluster's secret.
    """

    def __init__(
        self,
        transport: Transport,
        address: str,
        job: str,
        spec: JobSpec,
        parameters: Sequence[Tensor],
        *,
        on_existing: OnExisting,
        token: str,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.job = job
        self.spec = spec
        self._transport = transport
        self._on_existing, self._token = on_existing, token
        self._routing = Routing(spec, parameters)
        self._changed = threading.Condition()
        self._promised = 0
        self._entry: Entry | None = None
        self._plan: Plan | None = None  # of the open generation; None while frozen
        self._lineage = 0
        self._fresh = True
        self._versions = [-1] * len(self._routing.slices)
        self._version = -1
        self._record: Record | None = None
        self._unchanged = True  # whether all that was adopted was there before, bit for bit
        self._calls: set[Call] = set()
        self._leaving = False
        self._ended: AdashardError | None = None
        self._renewed = 0.0
        self._threads = ThreadPoolExecutor(thread_name_prefix="adashard-stream")
        self._uploads: set[int] = set()
        self._attendance = Attendance(
            transport,
            address,
            hello=self._hello,
            renewal=self._renewal,
            handle=self._handle,
            failed=self._end,
        )
        self._attendance.start()

    # --- the training loop's thread -------------------------------------------------------------

    @property
    def version(self) -> int:
        """The version of the weights that the worker holds whole; -1 for none of the job's."""
        return self._version

    @property
    def rank(self) -> int | None:
        """This worker's rank; None before it is part of a generation."""
        for member in self._entry.workers if self._entry else ():
            if member.id == self.id:
                return member.rank
        return None

    def step(self, push: Push) -> bool:
        """Takes one step with `push`; returns when the parameters hold the next version.

        A worker that joins adopts the job's weights. Where they are other than those that its
        gradient was computed on, the gradient is worth nothing and is dropped.

        Returns:
            Whether the gradient was used.

        Raises:
            AdashardError: the session has ended; parameters may be torn, a new one adopts them.
        """
        target: int | None = None
        self._unchanged = True
        while target is None or self._version < target:
            try:
                plan = self._wait_open()
                if self._version < plan.base:
                    self._take(plan, plan.base, None)
                    if target is None and not self._unchanged:
                        return False
                else:
                    target = self._version + 1 if target is None else target
                    self._take(plan, target, push)
            except StaleGeneration:
                continue
        return True

    def log(self, values: Mapping[str, float]) -> None:
        """Tells the coordinator what the loop wants seen; may be lost."""
        logged = Logged(job=self.job, step=max(self._version, 0), values=dict(values))
        self._attendance.send(logged)

    def close(self, timeout_s: float = LEAVE_S) -> None:
        """Leaves the job, once the others have what only this worker may hold. Idempotent."""
        with self._changed:
            if self._ended is None and not self._leaving:
                self._leaving = True
                self._attendance.renew()
            self._changed.wait_for(lambda: self._ended is not None, timeout_s)
        self.abandon()

    def abandon(self) -> None:
        """Ends the session without a word; the coordinator notices. Idempotent."""
        self._end(LeaseExpired(f"the session of worker {self.id} has ended"))
        self._attendance.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._transport.close()

    def _wait_open(self) -> Plan:
        """The plan of the open generation, once there is one.

        Raises:
            AdashardError: the session has ended.
        """
        with self._changed:
            said = False
            while self._plan is None and self._ended is None:
                if not self._changed.wait(_SAY_S) and not said:
                    said = True
                    log.info("job %r: waiting to take part (%s)", self.job, self._what_for())
            if self._ended is not None:
                raise self._ended
            assert self._plan is not None
            return self._plan

    def _what_for(self) -> str:
        if self._entry is None:
            return f"the first step needs {self.spec.min_workers} workers"
        return f"generation {self._promised} is being made"

    def _take(self, plan: Plan, step: int, push: Push | None) -> None:
        """Brings every slice to `step`, pushing for it or not.

        Raises:
            StaleGeneration: the generation has ended meanwhile.
        """
        reply = _Reply(step)
        record = self._record if self._version >= 0 else None
        counts = record.step_counts if record else (0,) * len(self.spec.parameters)
        settings = push.settings(counts) if push else ()
        streams: list[Future[None]] = []
        for member, indices in self._routing.by_shard(plan.entry).items():
            behind = [index for index in indices if self._versions[index] < step]
            if behind:
                begin = self._begin(plan.entry, member, step, push, settings, behind)
                streams.append(self._threads.submit(self._talk, member, begin, behind, push, reply))
        self._join(streams, step)
        with self._changed:
            self._check_generation(plan.entry.generation)
            self._version, self._fresh = step, False
            # Where all replies of the step had come before its generation ended, the plan has it.
            self._record = reply.record or (plan.record if plan.base == step else None)
        self._renew_now_and_then()

    def _join(self, streams: list[Future[None]], step: int) -> None:
        """Waits for all streams, also where one has failed; raises what matters most."""
        said = False
        try:
            while wait(streams, _SAY_S).not_done:
                if not said:
                    said = True
                    log.info("job %r: step %d waits for the other workers", self.job, step)
        except BaseException:
            self._cancel_calls()
            wait(streams)
            raise
        errors = [error for stream in streams if (error := stream.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, StaleGeneration)):
            raise error

    def _begin(
        self,
        entry: Entry,
        member: Member,
        step: int,
        push: Push | None,
        settings: tuple[GroupStep, ...],
        slices: list[int],
    ) -> Begin:
        everything = entry.placement.count(entry.shards.index(member)) == len(slices)
        return Begin(
            job=self.job,
            generation=entry.generation,
            sender=self.id,
            receiver=member.id,
            step=step,
            push=push is not None,
            version=min(self._versions[index] for index in slices),
            present=push.present(len(self.spec.parameters)) if push else b"",
            share=push.share if push else 1.0,
            groups=settings,
            dtypes=self._routing.dtypes(),
            slices=() if everything else tuple(slices),
        )

    # --- a stream's thread ----------------------------------------------------------------------

    def _talk(
        self, member: Member, begin: Begin, slices: list[int], push: Push | None, reply: _Reply
    ) -> None:
        """One shard's part of a step, repeated under the same name while nobody answers."""
        backoff = Backoff(STREAM_BUDGET_S, time.monotonic)
        while True:
            try:
                return self._stream(member, begin, slices, push, reply, first=backoff.attempts == 0)
            except AdashardError as error:
                wait_s = backoff.next_s()
                if not repeatable(error) or wait_s is None:
                    self._cancel_calls()
                    raise
                log.debug("job %r: %s; attempt %d", self.job, error.message, backoff.attempts)
                with self._changed:
                    self._changed.wait_for(lambda: not self._current(begin.generation), wait_s)
                    self._check_generation(begin.generation)

    def _stream(
        self,
        member: Member,
        begin: Begin,
        slices: list[int],
        push: Push | None,
        reply: _Reply,
        *,
        first: bool,
    ) -> None:
        acknowledged = threading.Event()
        complete = threading.Event()

        def frames() -> Iterator[bytes]:
            yield leading_frame(begin)
            if push is None or (not first and (acknowledged.wait(), complete.is_set())[1]):
                return  # a repeated push first hears whether it is needed
            for frame in self._routing.gradient_frames(push.gradients, slices):
                if complete.is_set():
                    return
                yield frame

        call = self._transport.push_pull(member.address, frames())
        try:
            self._register(call, begin.generation)
            for data in call:
                frame = read_frame(data)
                if isinstance(frame.leading, Acknowledge):
                    if frame.leading.complete:
                        complete.set()
                    acknowledged.set()
                else:
                    self._received(frame, begin, reply)
        finally:
            acknowledged.set()
            with self._changed:
                self._calls.discard(call)
        if any(self._versions[index] != begin.step for index in slices):
            raise ShardUnavailable(f"shard {member.id} at {member.address} ended a reply too early")

    def _received(self, frame: Frame, begin: Begin, reply: _Reply) -> None:
        """Takes a record, or writes weights in place (W6)."""
        with self._changed:
            self._check_generation(begin.generation)
            if isinstance(frame.leading, Record):
                if reply.record is not None and reply.record != frame.leading:
                    raise Internal(f"two shards have different records of step {begin.step}")
                reply.record = frame.leading
            for run, buffer in frame.pieces():
                count = self._routing.slices[run.slice].element_count
                if run.count == 0:
                    self._versions[run.slice] = begin.step
                    continue
                self._versions[run.slice] = -1  # torn until it is whole
                self._unchanged &= self._routing.write(run, buffer)
                reply.elements[run.slice] = reply.elements.get(run.slice, 0) + run.count
                if run.start == 0:
                    reply.elements[run.slice] = run.count
                if reply.elements[run.slice] > count:
                    raise InvalidFrame(f"slice {run.slice} came twice in one reply")
                if reply.elements[run.slice] == count:
                    self._versions[run.slice] = begin.step

    def _register(self, call: Call, generation: int) -> None:
        with self._changed:
            self._calls.add(call)
            self._check_generation(generation)

    def _cancel_calls(self) -> None:
        with self._changed:
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def _current(self, generation: int) -> bool:
        return (
            self._ended is None
            and self._plan is not None
            and self._plan.entry.generation == generation
        )

    def _check_generation(self, generation: int) -> None:
        if not self._current(generation):
            raise StaleGeneration(f"generation {generation} has ended")

    # --- the control stream's thread ------------------------------------------------------------

    def _hello(self) -> Hello:
        worker = WorkerHello(
            job=self.job,
            spec=self.spec,
            on_existing=self._on_existing,
            generation=self._promised,
        )
        return Hello(
            id=self.id,
            version=VERSION,
            host=platform.node(),
            pid=os.getpid(),
            token=self._token,
            worker=worker,
        )

    def _renewal(self) -> Renewal:
        standing = Standing(
            job=self.job,
            generation=self._promised,
            version=self._version,
            leaving=self._leaving,
        )
        return Renewal(standings=(standing,))

    def _renew_now_and_then(self) -> None:
        now = time.monotonic()
        if now - self._renewed >= _RENEW_AFTER_STEP_S:
            self._renewed = now
            self._attendance.renew()

    def _handle(self, message: FromCoordinator) -> None:
        match message:
            case Freeze(entry=entry):
                self._attendance.send(self._freeze(entry))
            case PlanRequest(plan=plan):
                self._supply(plan)
            case Open(plan=plan):
                if self._open(plan):
                    generation = plan.entry.generation
                    self._attendance.send(Opened(job=self.job, generation=generation))
            case Bye(generation=generation, error=error):
                if generation >= self._promised:
                    self._end(from_info(error) if error else LeaseExpired("left the job"))
            case Notice(text=text):
                log.info("job %r: %s", self.job, text)
            case Welcome(job_version=version) if version >= 0 and self._promised == 0:
                log.info("job %r exists: joining it at step %d", self.job, version)

    def _freeze(self, entry: Entry) -> Frozen | Stale:
        """Promises a generation (W2): nothing of an older one is used any more."""
        with self._changed:
            if entry.generation < self._promised:
                return Stale(job=self.job, promised=self._promised)
            if entry.generation > self._promised:
                self._promised, self._entry, self._plan = entry.generation, entry, None
                self._become_origin(entry)
                self._changed.notify_all()
            answer = self._frozen()
        self._cancel_calls()
        return answer

    def _become_origin(self, entry: Entry) -> None:
        """Where the lineage names this worker, its initial weights are the first version (W1)."""
        lineage = entry.lineage
        if lineage is not None and lineage.origin == self.id and self._fresh:
            self._lineage, self._version, self._fresh = lineage.number, lineage.base_version, False
            self._versions = [lineage.base_version] * len(self._versions)

    def _frozen(self) -> Frozen:
        lineage = self._entry.lineage if self._entry else None
        origin = (
            lineage is not None
            and lineage.origin == self.id
            and self._lineage == lineage.number
            and self._version == lineage.base_version
        )
        held = tuple(range(len(self._versions))) if origin else ()
        return Frozen(
            job=self.job,
            generation=self._promised,
            lineage=self._lineage,
            slices=held,
            versions=tuple(self._versions[index] for index in held),
            record=self._record,
            fresh=self._fresh,
            complete=self._version >= 0,
            leaving=self._leaving,
        )

    def _supply(self, plan: Plan) -> None:
        """Uploads the slices that this worker is the source of (W3), in a thread of its own."""
        wanted = [source.slice for source in plan.sources if source.member == self.id]
        generation = plan.entry.generation
        if not wanted or generation != self._promised or generation in self._uploads:
            return
        self._uploads = {generation}
        self._threads.submit(self._upload_all, plan, set(wanted))

    def _upload_all(self, plan: Plan, wanted: set[int]) -> None:
        generation = plan.entry.generation
        try:
            for member, indices in self._routing.by_shard(plan.entry).items():
                slices = [index for index in indices if index in wanted]
                if slices:
                    begin = UploadBegin(
                        job=self.job,
                        generation=generation,
                        sender=self.id,
                        receiver=member.id,
                        version=plan.base,
                    )
                    self._upload(member, begin, slices)
        except AdashardError as error:
            log.debug("job %r: an upload failed, and is repeated when asked: %s", self.job, error)
        finally:
            self._uploads.discard(generation)  # asked again, it is sent again

    def _upload(self, member: Member, begin: UploadBegin, slices: list[int]) -> None:
        def frames() -> Iterator[bytes]:
            yield leading_frame(begin)
            yield from self._routing.weight_frames(slices)

        self._transport.upload(member.address, frames())

    def _open(self, plan: Plan) -> bool:
        """Goes on with the plan of the promised generation (W4)."""
        with self._changed:
            if plan.entry.generation != self._promised:
                return False
            if self._plan is None:
                number = plan.entry.lineage.number if plan.entry.lineage else 0
                if number != self._lineage:
                    self._lineage, self._version, self._record = number, -1, None
                    self._versions = [-1] * len(self._versions)
                self._entry, self._plan = plan.entry, plan
                self._changed.notify_all()
            return True

    def _end(self, error: AdashardError) -> None:
        with self._changed:
            if self._ended is None:
                self._ended = error
                self._changed.notify_all()
        self._cancel_calls()
