"""One worker's taking part in one job, from join to leave.

The training loop's thread takes steps; a thread of the control stream answers freeze, plan and
open at any time, also during forward and backward. What they share is under one lock: the state of
`worker.py`, which decides, and the streams under way, which a freeze ends.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from adashard.retry import Backoff, repeatable
from adashard.routing import Routing
from adashard.transport.attendance import CONNECT_BUDGET_S, Attendance
from adashard.transport.base import Call, Transport
from adashard.wire.errors import (
    AdashardError,
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
    GroupStep,
    Hello,
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
    UploadBegin,
    Welcome,
    WorkerHello,
)
from adashard.wire.spec import JobSpec
from adashard.wire.version import VERSION
from adashard.worker import Worker

log = logging.getLogger("adashard")

LEAVE_S = 10.0
STREAM_BUDGET_S = 120.0
STREAMS_MAX = 512  # a step needs one for each shard at once; threads are made when needed
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
        self._worker = Worker(self.id, job, self._routing.slices)
        self._changed = threading.Condition()
        self._ended: AdashardError | None = None
        self._unchanged = True  # whether all that was adopted was there before, bit for bit
        self._calls: set[Call] = set()
        self._failed = False  # a stream of the step at hand, for good
        self._uploading = False
        self._renewed = 0.0
        self._threads = ThreadPoolExecutor(STREAMS_MAX, thread_name_prefix="adashard-stream")
        self._attendance = Attendance(
            transport,
            address,
            hello=self._hello,
            renewal=self._renewal,
            handle=self._handle,
            failed=self._end,
            connect_budget_s=CONNECT_BUDGET_S,
        )
        self._attendance.start()

    # --- the training loop's thread -------------------------------------------------------------

    @property
    def version(self) -> int:
        """The version of the weights that the worker holds whole; -1 for none of the job's."""
        return self._worker.version

    @property
    def rank(self) -> int | None:
        """This worker's rank; None before it is part of a generation."""
        return self._worker.rank

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
        backoff = Backoff(math.inf, time.monotonic, first_s=0.01, longest_s=0.2)
        while target is None or self.version < target:
            plan = self._wait_open()
            try:
                if self.version < plan.base:
                    self._take(plan, plan.base, None)
                    if target is None and not self._unchanged:
                        return False
                else:
                    target = self.version + 1 if target is None else target
                    self._take(plan, target, push)
            except StaleGeneration:  # of this worker, or of a shard that has not opened it yet
                over = partial(self._is_over, plan.entry.generation)
                with self._changed:
                    self._changed.wait_for(over, backoff.next_s())
        return True

    def log(self, values: Mapping[str, float]) -> None:
        """Tells the coordinator what the loop wants seen; may be lost."""
        logged = Logged(job=self.job, step=max(self.version, 0), values=dict(values))
        self._attendance.send(logged)

    def close(self, timeout_s: float = LEAVE_S) -> None:
        """Leaves the job, once the others have what only this worker may hold. Idempotent."""
        with self._changed:
            if self._ended is None and not self._worker.leaving:
                self._worker.leaving = True
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
            while self._worker.plan is None and self._ended is None:
                if not self._changed.wait(_SAY_S) and not said:
                    said = True
                    log.info("job %r: waiting to take part (%s)", self.job, self._what_for())
            if self._ended is not None:
                raise self._ended
            assert self._worker.plan is not None
            return self._worker.plan

    def _what_for(self) -> str:
        if self._worker.promised == 0:
            return f"the first step needs {self.spec.min_workers} workers"
        return f"generation {self._worker.promised} is being made"

    def _take(self, plan: Plan, step: int, push: Push | None) -> None:
        """Brings every slice to `step`, pushing for it or not.

        Raises:
            StaleGeneration: the generation has ended meanwhile.
        """
        begin = self._begin(plan.entry, step, push)
        streams: list[Future[None]] = []
        self._failed = False
        for member, indices in self._routing.by_shard(plan.entry).items():
            behind = self._worker.behind(indices, step)
            if behind:
                to_member = replace(
                    begin,
                    receiver=member.id,
                    version=self._worker.held(behind),
                    slices=() if len(behind) == len(indices) else tuple(behind),
                )
                streams.append(self._threads.submit(self._talk, member, to_member, behind, push))
        self._join(streams, step)
        with self._changed:
            self._worker.took(plan, step)
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
            self._fail()
            wait(streams)
            raise
        errors = [error for stream in streams if (error := stream.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, StaleGeneration)):
            raise error

    def _begin(self, entry: Entry, step: int, push: Push | None) -> Begin:
        """What is the same for all shards in a step."""
        return Begin(
            job=self.job,
            generation=entry.generation,
            sender=self.id,
            receiver="",
            step=step,
            push=push is not None,
            present=push.present(len(self.spec.parameters)) if push else b"",
            share=push.share if push else 1.0,
            groups=push.settings(self._worker.step_counts()) if push else (),
            dtypes=self._routing.dtypes(),
        )

    # --- a stream's thread ----------------------------------------------------------------------

    def _talk(self, member: Member, begin: Begin, slices: list[int], push: Push | None) -> None:
        """One shard's part of a step, repeated under the same name while nobody answers."""
        backoff = Backoff(STREAM_BUDGET_S, time.monotonic)
        while True:
            try:
                return self._stream(member, begin, slices, push, first=backoff.attempts == 0)
            except AdashardError as error:
                wait_s = backoff.next_s() if repeatable(error) else None
                if wait_s is None:
                    self._fail()
                    raise
                log.debug("job %r: %s; attempt %d", self.job, error.message, backoff.attempts)
                with self._changed:
                    self._changed.wait_for(partial(self._gives_up, begin.generation), wait_s)
                    self._check(begin.generation)

    def _stream(
        self,
        member: Member,
        begin: Begin,
        slices: list[int],
        push: Push | None,
        *,
        first: bool,
    ) -> None:
        acknowledged = threading.Event()
        complete = threading.Event()

        def frames() -> Iterator[bytes]:
            yield leading_frame(begin)
            if push is None:
                return
            if not first:
                acknowledged.wait()  # a repeated push first hears whether it is needed
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
                    self._received(frame, begin)
        finally:
            call.cancel()
            acknowledged.set()
            with self._changed:
                self._calls.discard(call)
        if self._worker.behind(slices, begin.step):
            raise ShardUnavailable(f"shard {member.id} at {member.address} ended a reply too early")

    def _received(self, frame: Frame, begin: Begin) -> None:
        """Takes a record, or writes weights in place."""
        with self._changed:
            self._worker.check(begin.generation)
            if isinstance(frame.leading, Record):
                self._worker.take_record(frame.leading, begin.step)
            for run, buffer in frame.pieces():
                self._worker.writes(run)
                if run.count:
                    self._unchanged &= self._routing.write(run, buffer)
                self._worker.wrote(run, begin.step)

    def _register(self, call: Call, generation: int) -> None:
        with self._changed:
            self._calls.add(call)
            self._check(generation)

    def _check(self, generation: int) -> None:
        """Refuses to go on in a generation that has ended, or in a step that has failed."""
        self._worker.check(generation)
        if self._failed:
            raise StaleGeneration("another stream of this step has failed")

    def _fail(self) -> None:
        """Ends all streams of this step, also those that have not begun."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()
        self._cancel_calls()

    def _cancel_calls(self) -> None:
        with self._changed:
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def _gives_up(self, generation: int) -> bool:
        return self._failed or self._is_over(generation)

    def _is_over(self, generation: int) -> bool:
        plan = self._worker.plan
        return plan is None or plan.entry.generation != generation

    # --- the control stream's thread ------------------------------------------------------------

    def _hello(self) -> Hello:
        worker = WorkerHello(
            job=self.job,
            spec=self.spec,
            on_existing=self._on_existing,
            generation=self._worker.promised,
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
        return Renewal(standings=(self._worker.standing(),))

    def _renew_now_and_then(self) -> None:
        now = time.monotonic()
        if now - self._renewed >= _RENEW_AFTER_STEP_S:
            self._renewed = now
            self._attendance.renew()

    def _handle(self, message: FromCoordinator) -> None:
        match message:
            case Freeze(entry=entry):
                self._freeze(entry)
            case PlanRequest(plan=plan):
                self._supply(plan)
            case Open(plan=plan):
                self._open(plan)
            case Bye(generation=generation, error=error):
                if generation >= self._worker.promised:
                    self._end(from_info(error) if error else LeaseExpired("left the job"))
                    self._attendance.close()  # the stream ends now, and is not missed
            case Notice(text=text):
                log.info("job %r: %s", self.job, text)
            case Welcome(job_version=version) if version >= 0 and self._worker.promised == 0:
                log.info("job %r exists: joining it at step %d", self.job, version)

    def _freeze(self, entry: Entry) -> None:
        with self._changed:
            answer = self._worker.freeze(entry)
            self._changed.notify_all()
        if self._worker.plan is None:
            self._cancel_calls()
        self._attendance.send(answer)

    def _open(self, plan: Plan) -> None:
        with self._changed:
            if not self._worker.open(plan):
                return
            self._changed.notify_all()
        self._attendance.send(Opened(job=self.job, generation=plan.entry.generation))

    def _supply(self, plan: Plan) -> None:
        """Uploads what this worker is the source of, in a thread of its own."""
        wanted = self._worker.supplies(plan)
        if wanted and not self._uploading:
            self._uploading = True
            self._threads.submit(self._upload_all, plan, wanted)

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
            self._uploading = False  # asked again, it is sent again

    def _upload(self, member: Member, begin: UploadBegin, slices: list[int]) -> None:
        def frames() -> Iterator[bytes]:
            yield leading_frame(begin)
            yield from self._routing.weight_frames(slices)

        self._transport.upload(member.address, frames())

    def _end(self, error: AdashardError) -> None:
        with self._changed:
            if self._ended is None:
                self._ended = error
                self._worker.plan = None  # nothing that is under way may go on
                self._changed.notify_all()
        self._cancel_calls()
