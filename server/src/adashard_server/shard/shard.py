"""A shard: its jobs, and what the edges talk to."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from adashard.wire.control import (
    Bye,
    Freeze,
    Frozen,
    Happened,
    Open,
    Opened,
    Planned,
    PlanRequest,
    Renewal,
    SnapshotRequest,
    Snapshotted,
    Stale,
    Standing,
    StepSummary,
)
from adashard.wire.errors import CheckpointUnreadable, Draining, StaleGeneration
from adashard.wire.messages import (
    Begin,
    Entry,
    ExchangeRequest,
    ExchangeResponse,
    Plan,
    UploadBegin,
)
from adashard_server.shard.engine import Engine
from adashard_server.shard.events import unreadable
from adashard_server.shard.exchange import PeerExchange
from adashard_server.shard.storing import NoStorage, Storage

Answer = Frozen | Planned | Opened | Stale


class Shard:
    """The jobs of one shard process. Thread-safe.

    Args:
        shard_id: new at every start.
        device: where weights and state live.
        exchange: how reports reach the other shards.
        clock: seconds, monotonic.
        tell: takes what the coordinator should hear without having asked: `Planned` after an
            upload, snapshots, step summaries and what people should know. Never blocks.
        storage: where checkpoints are; None for nowhere.
    """

    def __init__(
        self,
        shard_id: str,
        device: torch.device,
        exchange: PeerExchange,
        clock: Callable[[], float],
        tell: Callable[[Planned | StepSummary | Happened | Snapshotted], None],
        storage: Storage | None = None,
    ) -> None:
        self.id = shard_id
        self._device = device
        self._exchange = exchange
        self._clock = clock
        self._tell = tell
        self._storage = storage or NoStorage()
        self._engines: dict[str, Engine] = {}
        self._lock = threading.Lock()
        self._draining = False

    # --- the coordinator's calls ----------------------------------------------------------------

    def handle(self, message: Freeze | PlanRequest | Open | SnapshotRequest | Bye) -> Answer | None:
        """What the coordinator asks of this shard, and the answer to it, if any."""
        try:
            match message:
                case Freeze(entry=entry):
                    return self._made(entry).freeze(entry)
                case PlanRequest(plan=plan):
                    return self._planned(plan)
                case Open(plan=plan):
                    self._made(plan.entry).open(plan)
                    return Opened(job=plan.entry.job, generation=plan.entry.generation)
                case SnapshotRequest():
                    self._begin_snapshot(message)
                    return None
                case Bye(job=job):
                    self._forget(job)
                    return None
        except StaleGeneration:
            return None  # it asks again, or has been replaced

    def _planned(self, plan: Plan) -> Planned | None:
        entry = plan.entry
        try:
            done = self._made(entry).plan(plan)
        except CheckpointUnreadable as error:
            self._tell(unreadable(entry, error))
            return None
        return Planned(job=entry.job, generation=entry.generation) if done else None

    def _begin_snapshot(self, request: SnapshotRequest) -> None:
        """Cuts a snapshot in a thread of its own, and tells what has come of it."""
        with self._lock:
            engine = self._engines.get(request.job)
        if engine is None:
            return

        def run() -> None:
            answer = engine.snapshots.run(request)
            if answer is not None:
                self._tell(answer)

        threading.Thread(target=run, name="adashard-snapshot", daemon=True).start()

    def renewal(self) -> Renewal:
        """That this shard is alive, and where it stands in each job."""
        engines = self._all()
        return Renewal(
            standings=tuple(
                Standing(job=one.job, generation=one.generation, version=one.version)
                for one in engines
            ),
            draining=self._draining,
            holdings=tuple(one.holding() for one in engines),
        )

    def entries(self) -> tuple[Entry, ...]:
        """The newest entry of each job, for a coordinator that has kept none."""
        return tuple(entry for one in self._all() if (entry := one.entry) is not None)

    # --- the data plane -------------------------------------------------------------------------

    def begin(self, begin: Begin) -> Engine:
        """The engine that serves a stream which begins so, after its own checks.

        Raises:
            StaleGeneration: the job is not here, or the stream is meant for another process.
            Draining: this shard takes no new round.
        """
        engine = self._engine(begin.job, begin.receiver)
        fresh = begin.push and begin.step > engine.version
        if self._draining and fresh and not engine.collecting:
            raise Draining(f"shard {self.id} is draining and begins no new round")
        return engine

    def upload(self, begin: UploadBegin) -> Engine:
        """The engine that takes an upload.

        Raises:
            StaleGeneration: the job is not here, or the upload is meant for another process.
        """
        return self._engine(begin.job, begin.receiver)

    def uploaded(self, begin: UploadBegin, done: bool) -> None:
        """Tells the coordinator when an upload has brought the last slice."""
        if done:
            self._tell(Planned(job=begin.job, generation=begin.generation))

    def exchange(self, request: ExchangeRequest) -> ExchangeResponse:
        """Another shard's report.

        Raises:
            StaleGeneration: of another generation, or for another process.
        """
        return self._engine(request.report.job, request.receiver).reports.answer(request)

    # --- the process's calls --------------------------------------------------------------------

    def repeat(self) -> None:
        """Sends again what has not been answered; to be called about once a second."""
        for engine in self._all():
            engine.reports.repeat()

    def drain(self) -> None:
        """Begins no new round; `busy` tells when those under way have ended. Idempotent."""
        self._draining = True

    @property
    def busy(self) -> bool:
        """Whether a round is under way in any job."""
        return any(engine.collecting for engine in self._all())

    # --- inside ---------------------------------------------------------------------------------

    def _all(self) -> list[Engine]:
        with self._lock:
            return list(self._engines.values())

    def _made(self, entry: Entry) -> Engine:
        with self._lock:
            engine = self._engines.get(entry.job)
            if engine is None:
                engine = self._engines[entry.job] = Engine(
                    entry.job,
                    self.id,
                    self._device,
                    self._exchange,
                    self._clock,
                    self._tell,
                    self._storage,
                )
            return engine

    def _engine(self, job: str, receiver: str) -> Engine:
        with self._lock:
            engine = self._engines.get(job)
        if engine is None or receiver != self.id:
            raise StaleGeneration(f"shard {self.id} does not hold job {job!r} for {receiver}")
        return engine

    def _forget(self, job: str) -> None:
        with self._lock:
            gone = [self._engines.pop(one) for one in list(self._engines) if job in ("", one)]
        for engine in gone:
            engine.snapshots.end()
