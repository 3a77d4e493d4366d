"""Whole shards around one table: real tensors and threads, and the coordinator's part by hand."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from tests.shard import jobs
from torch import Tensor

from adashard.wire.checksums import extended
from adashard.wire.control import Freeze, Frozen, Happened, Open, Planned, PlanRequest, StepSummary
from adashard.wire.frames import read_frame
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
from adashard.wire.tensors import as_buffer, flat_on_cpu, from_buffer, torch_dtype, wire_dtype
from adashard_server.shard.early import EarlyRuns
from adashard_server.shard.engine import Engine
from adashard_server.shard.exchange import MemoryExchange, PeerExchange
from adashard_server.shard.shard import Shard
from adashard_server.shard.storing import Storage

Weights = dict[int, Tensor]
States = dict[int, dict[Content, Tensor]]
JOIN_S = 60.0  # a test that waits longer hangs


def alive() -> bool:
    return True


@dataclass
class Reply:
    """What one stream of a worker has got."""

    acknowledge: Acknowledge
    record: Record | None
    weights: Weights
    unchanged: list[int]
    states: States = field(default_factory=dict)


class Table:
    """Shards of one job that exchange reports in memory unless told otherwise."""

    def __init__(
        self,
        names: Sequence[str] = ("s0",),
        exchange: PeerExchange | None = None,
        storage: Storage | None = None,
        told: list[Planned | StepSummary | Happened] | None = None,
    ) -> None:
        self.exchange = exchange or MemoryExchange()
        self.entry: Entry | None = None
        self.told = [] if told is None else told
        ticks = itertools.count()
        self.shards = {
            name: Shard(
                name,
                torch.device("cpu"),
                self.exchange,
                clock=lambda: float(next(ticks)),
                tell=self.told.append,
                storage=storage,
            )
            for name in names
        }
        if isinstance(self.exchange, MemoryExchange):
            for name, shard in self.shards.items():
                self.exchange.attach(name, shard.exchange)

    def freeze(self, entry: Entry) -> list[Frozen]:
        return [shard.handle(Freeze(entry=entry)) for shard in self.shards.values()]

    def plan(self, plan: Plan) -> list[Planned | None]:
        return [shard.handle(PlanRequest(plan=plan)) for shard in self.shards.values()]

    def open(
        self, plan: Plan, weights: Weights | None = None, states: States | None = None
    ) -> None:
        """All of a change of generation; `weights` are uploaded where a shard lacks them."""
        self.entry = plan.entry
        self.freeze(plan.entry)
        for shard, planned in zip(self.shards.values(), self.plan(plan), strict=True):
            if planned is None:
                assert weights is not None
                self.upload(shard, plan, weights, states)
        for shard in self.shards.values():
            shard.handle(Open(plan=plan))

    def upload(
        self, shard: Shard, plan: Plan, weights: Weights, states: States | None = None
    ) -> None:
        """Uploads what is placed on a shard, with its optimizer state if there is any."""
        begin = UploadBegin(
            job=jobs.JOB,
            generation=plan.entry.generation,
            sender="a",
            receiver=shard.id,
            version=plan.base,
            state=states is not None,
        )
        engine = shard.upload(begin)
        upload = engine.upload(begin, alive)
        done = False
        for index, weight in weights.items():
            if self.owner(index, plan.entry) == shard.id:
                done = engine.upload_piece(upload, *piece(index, weight))
                for content, tensor in (states or {}).get(index, {}).items():
                    done = engine.upload_piece(upload, *piece(index, tensor, content=content))
        shard.uploaded(begin, done)

    def owner(self, index: int, entry: Entry | None = None) -> str:
        """The shard on which a slice is placed."""
        entry = entry or self.entry
        assert entry is not None
        return entry.shards[entry.placement[index]].id

    def engine(self, name: str = "s0") -> Engine:
        """The engine of the job on one shard."""
        begin = UploadBegin(job=jobs.JOB, generation=0, sender="", receiver=name, version=0)
        return self.shards[name].upload(begin)

    def leave_room(self, early_bytes_max: int) -> None:
        """How many bytes of frames that come before their turn each shard may keep."""
        for name in self.shards:
            self.engine(name)._early = EarlyRuns(early_bytes_max)

    def step(self, begin: Begin, gradients: Weights, borders: Sequence[int] = ()) -> Reply:
        """One worker's step, with a thread for each shard."""
        replies: dict[str, Reply] = {}

        def talk(name: str) -> None:
            mine = {i: one for i, one in gradients.items() if self.owner(i) == name}
            to_shard = replace(begin, receiver=name)
            replies[name] = talked(self.shards[name], to_shard, mine, borders)

        together(*(lambda name=name: talk(name) for name in self.shards))
        weights = {i: w for reply in replies.values() for i, w in reply.weights.items()}
        first = next(iter(replies.values()))
        states = {i: s for reply in replies.values() for i, s in reply.states.items()}
        unchanged = [index for reply in replies.values() for index in reply.unchanged]
        return Reply(first.acknowledge, first.record, weights, unchanged, states)


def piece(
    index: int,
    values: Tensor,
    start: int = 0,
    stop: int | None = None,
    content: Content = Content.WEIGHT,
) -> tuple[Run, memoryview]:
    """A run of a slice or of its state, and its bytes."""
    flat = flat_on_cpu(values.reshape(-1)[start:stop])
    dtype = wire_dtype(flat.dtype)
    whole = flat_on_cpu(values.reshape(-1)[:stop])
    run = Run(
        slice=index,
        start=start,
        count=flat.numel(),
        dtype=dtype,
        content=content,
        checksum=extended(0, as_buffer(whole)),
    )
    return run, as_buffer(flat)


def push(engine: Engine, begin: Begin, gradients: Weights, borders: Sequence[int] = ()) -> None:
    """Sends gradients of slices that the shard holds, each cut at `borders`."""
    for index, gradient in gradients.items():
        count = gradient.numel()
        cuts = sorted({0, count, *(border for border in borders if border < count)})
        for start, stop in itertools.pairwise(cuts):
            engine.push(begin, *piece(index, gradient, start, stop), alive)


def talked(
    shard: Shard, begin: Begin, gradients: Weights | None = None, borders: Sequence[int] = ()
) -> Reply:
    """One stream from its begin to its end, as the service carries it."""
    engine = shard.begin(begin)
    acknowledge = engine.begin(begin)
    if begin.push and not acknowledge.complete:
        push(engine, begin, gradients or {}, borders)
    record = engine.wait_decided(begin, alive)
    return read(acknowledge, record, engine.reply(begin, alive))


def read(acknowledge: Acknowledge, record: Record | None, frames: Iterator[bytes]) -> Reply:
    reply = Reply(acknowledge, record, {}, [])
    for data in frames:
        for run, buffer in read_frame(data).pieces():
            if run.count == 0:
                reply.unchanged.append(run.slice)
                continue
            tensors = reply.states.setdefault(run.slice, {})
            before = tensors.get(run.content, torch.empty(0, dtype=torch_dtype(run.dtype)))
            assert run.start == before.numel()
            tensors[run.content] = torch.cat([before, from_buffer(buffer, run.dtype)])
    for index, tensors in reply.states.items():
        reply.weights[index] = tensors.pop(Content.WEIGHT)
    return reply


def together(*actions: Callable[[], object]) -> list[object]:
    """Runs the actions at once, each in a thread; what each returned, or the first error."""
    results: list[object] = [None] * len(actions)

    def run(index: int) -> None:
        try:
            results[index] = actions[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@dataclass
class Waits:
    """Tells when threads begin to wait for their turn in an engine."""

    began: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def one(self) -> None:
        """Returns once another thread waits; the lock is free then, or will be at once."""
        assert self.began.acquire(timeout=JOIN_S), "nobody waits"


@contextlib.contextmanager
def watched(engine: Engine) -> Iterator[Waits]:
    """Watches the waits of an engine: no test has to sleep until a thread waits."""
    waits, turn = Waits(), engine._turn
    original = turn.wait

    def wait(timeout: float | None = None) -> bool:
        waits.began.release()
        return original(timeout)

    turn.wait = wait
    try:
        yield waits
    finally:
        turn.wait = original
