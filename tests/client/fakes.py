"""A transport in memory: a coordinator and shards that do what the test tells them."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from tests.shard import jobs
from tests.shard.tables import piece
from torch import Tensor

from adashard.wire.control import Bye, FromCoordinator, FromMember, Hello, Renewal, Welcome
from adashard.wire.errors import AdashardError, ShardUnavailable, StaleGeneration
from adashard.wire.frames import data_frame, leading_frame, read_frame
from adashard.wire.messages import (
    Acknowledge,
    Begin,
    Content,
    Outcome,
    Record,
    UploadBegin,
    UploadReply,
)
from adashard.wire.tensors import from_buffer, torch_dtype

WAIT_S = 60.0
Handler = Callable[["FakeShard", Begin, Iterator[bytes]], Iterator[bytes]]


def record(step: int, count: int = 1, parameters: int = 2) -> Record:
    """The record of a step that one worker took."""
    return Record(
        step=step,
        workers=("w",),
        shares=(1.0,),
        outcome=Outcome.APPLY,
        present=jobs.bits(range(parameters), parameters),
        step_counts=(count,) * parameters,
        groups=(jobs.group_step(),),
    )


class FakeCall:
    """A stream to a shard: its handler runs in the thread that reads."""

    def __init__(self, frames: Iterator[bytes]) -> None:
        self._frames = frames
        self.cancelled = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        for frame in self._frames:
            if self.cancelled.is_set():
                raise StaleGeneration("ended from this side")
            yield frame

    def cancel(self) -> None:
        self.cancelled.set()


class FakeShard:
    """Weights at a version; a script of handlers replaces the next streams' honest answers."""

    def __init__(self, weights: dict[int, Tensor], version: int = 0) -> None:
        self.weights, self.version = weights, version
        self.record: Record | None = None
        self.script: list[Handler] = []
        self.begins: list[Begin] = []
        self.uploads: list[tuple[UploadBegin, dict[int, Tensor]]] = []
        self.capsules: dict[int, Tensor] = {}  # that have been uploaded, by slice
        self.upload_errors: list[AdashardError] = []

    def serve(self, frames: Iterator[bytes]) -> Iterator[bytes]:
        begin = read_frame(next(frames)).leading
        assert isinstance(begin, Begin)
        self.begins.append(begin)
        handler = self.script.pop(0) if self.script else honest
        yield from handler(self, begin, frames)

    def take(self, begin: Begin, gradients: dict[int, Tensor]) -> None:
        """A step of plain gradient descent, so that every element moves."""
        for index, gradient in gradients.items():
            self.weights[index] = self.weights[index] - gradient
        self.version = begin.step
        self.record = record(begin.step, begin.step)

    def reply(self, begin: Begin) -> Iterator[bytes]:
        if self.record is not None:
            yield leading_frame(self.record)
        for index, weight in self.weights.items():
            if not begin.slices or index in begin.slices:
                run, part = piece(index, weight.to(torch_dtype(begin.dtypes[0])))
                yield data_frame([run], [part])
                if begin.state:
                    run, part = piece(index, self.state_of(index), content=Content.VECTOR)
                    yield data_frame([run], [part])

    def state_of(self, index: int) -> Tensor:
        """The second moment of a slice, other in every version."""
        return torch.full_like(self.weights[index], float(self.version))


def honest(shard: FakeShard, begin: Begin, frames: Iterator[bytes]) -> Iterator[bytes]:
    complete = shard.version == begin.step
    yield leading_frame(Acknowledge(version=shard.version, complete=complete))
    gradients = read(frames)
    if begin.push and not complete:
        shard.take(begin, gradients)
    yield from shard.reply(begin)


def read(frames: Iterable[bytes], content: Content = Content.WEIGHT) -> dict[int, Tensor]:
    """Whole slices, or what there is of their state, from data frames."""
    found: dict[int, list[Tensor]] = {}
    for data in frames:
        for run, buffer in read_frame(data).pieces():
            if run.content is content:
                found.setdefault(run.slice, []).append(from_buffer(buffer, run.dtype))
    return {index: torch.cat(parts) for index, parts in found.items()}


class FakeControl:
    """A control stream; ends with an error, or when it is cancelled."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[FromCoordinator | AdashardError | None] = queue.SimpleQueue()

    def say(self, message: FromCoordinator | AdashardError | None) -> None:
        self._inbox.put(message)

    def __iter__(self) -> Iterator[FromCoordinator]:
        while (message := self._inbox.get()) is not None:
            if isinstance(message, AdashardError):
                raise message
            yield message

    def cancel(self) -> None:
        self.say(None)


class FakeTransport:
    """Implements `transport.base.Transport`.

    Attributes:
        heard: what the member has said, in order.
        controls: its control streams, as they are opened.
        refusals: errors that end the next control streams before they stand.
        calls: the newest stream to each shard.
        blesses: whether a leaving worker is let go.
    """

    def __init__(self, shards: dict[str, FakeShard] | None = None) -> None:
        self.shards = shards or {}
        self.heard: queue.SimpleQueue[FromMember] = queue.SimpleQueue()
        self.controls: queue.SimpleQueue[FakeControl] = queue.SimpleQueue()
        self.refusals: list[AdashardError] = []
        self.blesses = True
        self.renew_s = 1.0
        self.calls: dict[str, FakeCall] = {}
        self.closed = 0

    def attend(self, address: str, messages: Iterator[FromMember]) -> FakeControl:
        control = FakeControl()
        if self.refusals:
            control.say(self.refusals.pop(0))
        else:
            control.say(Welcome(version="0", lease_s=15.0, renew_s=self.renew_s))
            self.controls.put(control)
        threading.Thread(target=self._listen, args=(messages, control), daemon=True).start()
        return control

    def push_pull(self, address: str, frames: Iterable[bytes]) -> FakeCall:
        if address not in self.shards:
            raise ShardUnavailable(f"no shard at {address}")
        call = self.calls[address] = FakeCall(self.shards[address].serve(iter(frames)))
        return call

    def upload(self, address: str, frames: Iterable[bytes]) -> UploadReply:
        shard, stream = self.shards[address], iter(frames)
        begin = read_frame(next(stream)).leading
        assert isinstance(begin, UploadBegin)
        if shard.upload_errors:
            raise shard.upload_errors.pop(0)
        frames = list(stream)
        slices = {index: one.clone() for index, one in read(frames).items()}
        shard.capsules |= read(frames, Content.VECTOR)
        shard.uploads.append((begin, slices))
        return UploadReply(slice_count=len(slices))

    def close(self) -> None:
        self.closed += 1

    def control(self) -> FakeControl:
        """The next control stream that is opened."""
        return self.controls.get(timeout=WAIT_S)

    def hear(self, kind: type[FromMember]):
        """The next message of a kind; others are passed over."""
        for _ in itertools.repeat(None):
            message = self.heard.get(timeout=WAIT_S)
            if isinstance(message, kind):
                return message
        raise AssertionError

    def _listen(self, messages: Iterator[FromMember], control: FakeControl) -> None:
        for message in messages:
            self.heard.put(message)
            leaving = isinstance(message, Renewal) and any(one.leaving for one in message.standings)
            if leaving and self.blesses:
                control.say(Bye(job=jobs.JOB, generation=1 << 30))
            if isinstance(message, Hello):
                assert message.id
