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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from adashard import failpoints
from adashard.arrivals import Arrival
from adashard.copies import Copies
from adashard.push import Push, Replies
from adashard.retry import Backoff
from adashard.routing import Routing
from adashard.rows import sparse_bits
from adashard.state import Gathering, State
from adashard.streams import SAY_S, Streams, Talk
from adashard.transport.attendance import CONNECT_BUDGET_S, Attendance
from adashard.transport.base import Transport
from adashard.uploads import Uploads
from adashard.wire.control import (
    Bye,
    Freeze,
    FromCoordinator,
    Hello,
    Logged,
    Notice,
    OnExisting,
    Open,
    Opened,
    PlanRequest,
    Renewal,
    Welcome,
    WorkerHello,
)
from adashard.wire.errors import (
    AdashardError,
    JobExists,
    LeaseExpired,
    StaleGeneration,
    from_info,
)
from adashard.wire.messages import Begin, Entry, Member, Plan, Record
from adashard.wire.spec import DType, JobSpec
from adashard.wire.version import VERSION
from adashard.worker import Worker

log = logging.getLogger("adashard")

LEAVE_S = 10.0
_RENEW_AFTER_STEP_S = 0.2


class Session:
    """A worker in a job. `step`, `state`, `log` and `close` belong to the training loop's thread.

    Args:
        transport: reaches the servers; closed with the session.
        address: host:port of the coordinator.
        job: its name.
        spec: what the worker believes the job to be.
        parameters: the tensors, in the order of `spec`; written in place during `step`.
        on_existing: what to do when the job exists.
        token: the cluster's secret.
        replies: how weights are wanted back; None for as they are.
        loaded: a state that the job is to begin with, or has; None for whatever it has.
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
        replies: Replies | None = None,
        loaded: State | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.job = job
        self.spec = spec
        self._parameters = tuple(parameters)
        self._transport = transport
        self._on_existing, self._token = on_existing, token
        self._replies = replies or Replies()
        self._loaded = loaded  # until a step has been taken from it
        self._fingerprint = loaded.fingerprint() if loaded else ""
        self._routing: Routing | None = None
        self._copies: Copies | None = None
        self._worker = Worker(self.id, job, loaded.record() if loaded else None)
        self._changed = threading.Condition()
        self._streams = Streams(transport, job, self._changed, self._worker.check)
        self._ended: AdashardError | None = None
        self._unchanged = True  # whether all that was adopted was there before, bit for bit
        self._begun = -1  # the step of which a push may have reached a shard
        self._renewed = 0.0
        self._attendance = Attendance(
            transport,
            address,
            hello=self._hello,
            renewal=self._renewal,
            handle=self._handle,
            failed=self._end,
            connect_budget_s=CONNECT_BUDGET_S,
        )
        self._uploads = Uploads(
            transport,
            job,
            self.id,
            tell=self._attendance.send,
            intact=self._intact,
            missed=self._missed,
            links=self._streams.links,
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

    @property
    def applied(self) -> bool:
        """Whether the newest step changed weights; not one with a gradient that is not finite."""
        return self._worker.applied

    def step(self, push: Push) -> bool:
        """Takes one step with `push`; returns when the parameters hold the next version.

        A worker that joins adopts the job's weights. Where they are other than those that its
        gradient was computed on, the gradient is worth nothing and is dropped.

        Returns:
            Whether the gradient was used.

        Raises:
            JobExists: the job has another state than the one that was loaded.
            AdashardError: the session has ended; parameters may be torn, a new one adopts them.
        """
        target, lineage = None, None
        self._unchanged = True
        backoff = _between_generations()
        while target is None or self.version < target:
            plan = self._wait_open()
            if plan.entry.lineage != lineage:  # the gradient may be one of other weights
                target, lineage, self._unchanged = None, plan.entry.lineage, True
            try:
                self._compare_loaded(plan)
                if self.version < plan.base:
                    self._take(plan, plan.base, push if target == plan.base else None)
                    if target is None and not self._unchanged:
                        return False
                else:
                    target = self.version + 1 if target is None else target
                    self._take(plan, target, push)
            except StaleGeneration:  # of this worker, or of a shard that has not opened it yet
                self._wait_change(plan.entry.generation, backoff.next_s())
        self._loaded = None
        return True

    def state(self) -> State:
        """The job's whole optimizer state at the version that this worker stands at.

        The shards stand there too, and stay as long as this worker has not pushed again, so that
        what they send is of one version. The other workers may push meanwhile.

        Raises:
            AdashardError: the session has ended, or a shard has not answered within its budget.
        """
        backoff = _between_generations()
        while True:
            plan = self._wait_open()
            try:
                return self._pull_state(plan, self.version)
            except StaleGeneration:
                self._wait_change(plan.entry.generation, backoff.next_s())

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
        self._streams.close()
        self._transport.close()

    def _wait_open(self) -> Plan:
        """The plan of the open generation, once there is one.

        Raises:
            AdashardError: the session has ended.
        """
        with self._changed:
            said = False
            while self._worker.plan is None and self._ended is None:
                if not self._changed.wait(SAY_S) and not said:
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
        """Brings every slice to `step`, pushing for it where a shard needs it, or not.

        Raises:
            StaleGeneration: the generation has ended meanwhile.
        """
        talks, begins = [], dict[bool, Begin]()
        for member, indices in self._routed.by_shard(plan.entry).items():
            behind = self._worker.behind(indices, step)
            if not behind:
                continue
            owed = self._worker.owes(plan, behind, step) if push else []
            if bool(owed) not in begins:
                begins[bool(owed)] = self._begin(plan.entry, step, push if owed else None)
            begin = replace(
                begins[bool(owed)],
                receiver=member.id,
                version=self._worker.held(behind),
                slices=() if len(behind) == len(indices) else tuple(behind),
            )
            talks.append(self._talk(member, begin, behind, push, owed))
        if True in begins:
            self._begun = step
        self._streams.talk(talks, waiting=f"step {step} waits for the other workers")
        failpoints.reach("step.taken")
        with self._changed:
            self._worker.took(plan, step)
        self._renew_now_and_then()

    def _talk(
        self, member: Member, begin: Begin, slices: list[int], push: Push | None, owed: list[int]
    ) -> Talk:
        """One shard's part of a step."""
        frames, gradient = self._routed.gradient_frames, None
        if push and begin.push:
            gradient = partial(frames, push.gradients, owed, encoding=push.encoding)
        return Talk(
            member=member,
            begin=begin,
            parts=self._held.parts,
            gradient=gradient,
            begun=begin.step == self._begun,
            received=partial(self._received, begin),
            whole=lambda: not self._worker.behind(slices, begin.step),
        )

    def _received(self, begin: Begin, came: Record | Arrival) -> None:
        """Takes a record, or switches a slice: weights, state and version together (W6)."""
        if isinstance(came, Record):
            self._worker.take_record(came, begin.step)
            return
        if came.pieces:
            self._unchanged &= self._held.put(came)
        self._worker.arrived(came.slice, begin.step, unchanged=not came.pieces)

    def _begin(self, entry: Entry, step: int, push: Push | None) -> Begin:
        """What is the same for all shards in a step."""
        begin = Begin(
            job=self.job,
            generation=entry.generation,
            sender=self.id,
            receiver="",
            step=step,
            push=False,
            dtypes=self._routed.dtypes(),
            state=self._held.with_state,
            rounding=self._replies.rounding,
            seed=self._replies.seed,
        )
        if push is None:
            return begin
        count = len(self.spec.parameters)
        return replace(
            begin,
            push=True,
            present=push.present(count),
            not_finite=push.not_finite,
            sparse=sparse_bits(push.gradients, count),
            share=push.share,
            groups=push.settings(self._worker.step_counts()),
            max_grad_norm=push.max_grad_norm or 0.0,
        )

    def _pull_state(self, plan: Plan, version: int) -> State:
        """The state at `version`, which is the one that the shards of the generation stand at.

        It is a pull of a version that is decided, so it waits for nobody and nobody for it.

        Raises:
            StaleGeneration: the generation has ended meanwhile.
        """
        rounded = {i for i, one in enumerate(self._parameters) if self._replies.rounded_to(one)}
        gathering = Gathering(plan.entry.spec, version, masters=rounded)
        begin = replace(self._begin(plan.entry, version, None), dtypes=(DType.FLOAT32,), state=True)
        talks = [
            Talk(
                member=member,
                begin=replace(begin, receiver=member.id),
                parts=gathering.parts,
                received=gathering.receive,
                whole=partial(gathering.has, indices),
            )
            for member, indices in self._routed.by_shard(plan.entry).items()
        ]
        self._streams.talk(talks, waiting=f"the state of step {version} is on its way")
        return gathering.state()

    def _compare_loaded(self, plan: Plan) -> None:
        """Lets a worker that has loaded a state only into a job that has the same.

        A job that began with it has its fingerprint. Another one may have come to the same state,
        as when the worker that saved it has ended since and nobody has stepped the job.

        Raises:
            JobExists: the job has another state.
            StaleGeneration: the generation has ended meanwhile.
        """
        lineage = plan.entry.lineage
        if self._loaded is None or (lineage and lineage.fingerprint == self._fingerprint):
            return
        same = plan.base == self._loaded.version and (
            self._pull_state(plan, plan.base).fingerprint() == self._fingerprint
        )
        if not same:
            raise JobExists(
                f"job {self.job!r} is at step {plan.base}, and its optimizer state is not the "
                f"one of step {self._loaded.version} that was loaded",
                job=self.job,
            )
        self._loaded = None

    def _wait_change(self, generation: int, wait_s: float | None) -> None:
        """Waits until a generation has ended, and not longer."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over(generation), wait_s)

    def _is_over(self, generation: int) -> bool:
        plan = self._worker.plan
        return plan is None or plan.entry.generation != generation

    @property
    def _routed(self) -> Routing:
        """The parameters along the placement; there from the first generation on."""
        assert self._routing is not None
        return self._routing

    @property
    def _held(self) -> Copies:
        """The copies along the placement; there from the first generation on."""
        assert self._copies is not None
        return self._copies

    # --- the control stream's thread ------------------------------------------------------------

    def _hello(self) -> Hello:
        worker = WorkerHello(
            job=self.job,
            spec=self.spec,
            on_existing=self._on_existing,
            generation=self._worker.promised,
            version=self._loaded.version if self._loaded else 0,
            fingerprint=self._fingerprint if self._loaded else "",
        )
        return Hello(
            id=self.id,
            version=VERSION,
            host=platform.node(),
            pid=os.getpid(),
            token=self._token,
            worker=worker,
            entries=(self._worker.entry,) if self._worker.entry else (),
        )

    def _renewal(self) -> Renewal:
        broken = self._streams.links.broken()
        return Renewal(standings=(self._worker.standing(),), broken_links=broken)

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
            case Welcome(lease_s=lease_s, job_version=version):
                self._streams.links.lease_s = lease_s
                if version >= 0 and self._worker.promised == 0:
                    log.info("job %r exists: joining it at step %d", self.job, version)

    def _freeze(self, entry: Entry) -> None:
        with self._changed:
            own = self._worker.version
            answer = self._worker.freeze(entry)
            if self._copies is None or self._copies.spec != entry.spec:
                self._routing = Routing(entry.spec, self._parameters, replies=self._replies)
                self._copies = Copies(entry.spec, self._routing)
            if own < 0 <= self._worker.version:
                self._held.begin(self._loaded)
            self._changed.notify_all()
        if self._worker.plan is None:
            self._streams.cancel()
        self._attendance.send(answer)

    def _open(self, plan: Plan) -> None:
        with self._changed:
            if not self._worker.open(plan):
                return
            self._changed.notify_all()
        self._attendance.send(Opened(job=self.job, generation=plan.entry.generation))

    def _supply(self, plan: Plan) -> None:
        """Uploads what this worker is the source of, in a thread of its own (W3)."""
        self._missed(plan)
        wanted = self._uploads.begin(plan, self._worker.supplies(plan))
        if wanted:
            self._streams.start(partial(self._uploads.send, plan, wanted, self._held))

    def _intact(self, index: int) -> bool:
        with self._changed:
            intact = self._held.intact(index)
            if not intact:
                self._worker.changed(index)
        return intact

    def _missed(self, plan: Plan) -> None:
        """Answers the freeze once more, where the plan counts on what is not here any more."""
        with self._changed:
            answer = self._worker.freeze(plan.entry) if self._worker.misses(plan) else None
        if answer is not None:
            self._attendance.send(answer)

    def _end(self, error: AdashardError) -> None:
        with self._changed:
            if self._ended is None:
                self._ended = error
                self._worker.plan = None  # nothing that is under way may go on
                self._changed.notify_all()
        self._streams.cancel()


def _between_generations() -> Backoff:
    """How long to wait for the next generation before looking again."""
    return Backoff(math.inf, time.monotonic, first_s=0.01, longest_s=0.2)
