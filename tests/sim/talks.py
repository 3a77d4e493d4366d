"""A worker's streams to shards: one to each at the same time, repeated under its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from tests.sim.clockwork import Task
from tests.sim.history import Gradient, Violation, Weights
from tests.sim.network import END, Broken, Stream

from adashard.wire.errors import AdashardError, StaleGeneration
from adashard.wire.messages import Acknowledge, Begin, Record, Run
from adashard_server.shard.records import bit

if TYPE_CHECKING:
    from tests.sim.worker import SimWorker

BACKOFF_S = 0.5


@dataclass
class Talk:
    """What one shard is asked for.

    Attributes:
        begin: the first frame.
        slices: those that are wanted.
        pushed: those of them that a gradient goes to.
        gradient: None in a pull.
        begun: whether some of it may be there already, from an earlier generation.
    """

    begin: Begin
    slices: list[int]
    pushed: list[int]
    gradient: Gradient | None
    begun: bool


@dataclass
class Reading:
    """What one stream has heard of its shard so far."""

    acknowledged: bool = False
    complete: bool = False
    ended: bool = False
    cancelled: bool = False
    progress: dict[int, int] = field(default_factory=dict)
    coming: dict[int, list[Weights | None]] = field(default_factory=dict)


class Talks:
    """The streams under way of one worker."""

    def __init__(self, worker: SimWorker) -> None:
        self._worker = worker
        self._streams: dict[Stream, Reading] = {}
        self._under_way = 0
        self._errors: list[AdashardError] = []

    def talk(self, talks: list[Talk]) -> Task:
        """Talks to several shards at once; ends when each has answered whole.

        Raises:
            StaleGeneration: the generation has ended meanwhile, here or at a shard.
            AdashardError: a shard has refused.
        """
        self._errors, self._under_way = [], len(talks)
        for talk in talks:
            self._worker.start(self._repeat(talk))
        yield lambda: not self._under_way
        for error in sorted(self._errors, key=lambda error: isinstance(error, StaleGeneration)):
            raise error

    def cancel(self) -> None:
        """Ends every stream under way."""
        for stream, reading in self._streams.items():
            reading.cancelled = True
            stream.cut()

    def _repeat(self, talk: Talk) -> Task:
        """One shard's part of a step, repeated under the same name while the stream breaks."""
        try:
            while True:
                try:
                    yield from self._stream(talk)
                    break
                except Broken:
                    talk.begun = True
                    yield self._worker.loop.rng.uniform(0.0, BACKOFF_S)
                    self._check(talk.begin)
                    if self._errors:
                        raise StaleGeneration("another part of the step has failed") from None
        except AdashardError as error:
            self._errors.append(error)
            self.cancel()
        self._under_way -= 1

    def _stream(self, talk: Talk) -> Task:
        worker, begin = self._worker, talk.begin
        self._check(begin)
        shard = worker.cluster.shards[begin.receiver]
        stream, reading = Stream(worker.cluster.network, worker, shard), Reading()
        shard.start(shard.push_pull(stream))
        self._streams[stream] = reading
        stream.up.send(begin)
        worker.links.asked(shard.name, (begin.generation, begin.step))
        worker.start(self._feed(stream, reading, talk))
        try:
            while (item := (yield from stream.down.next())) != END:
                self._received(talk, reading, item)
        except Broken:
            if reading.cancelled:
                raise StaleGeneration("ended from this side") from None
            raise
        finally:
            reading.ended = True
            worker.links.dropped(shard.name)
            self._streams.pop(stream, None)
            stream.close()
        if worker.worker.behind(talk.slices, begin.step):
            raise Violation(f"{begin.receiver} ended a reply to {worker.name} too early")

    def _feed(self, stream: Stream, reading: Reading, talk: Talk) -> Task:
        """Sends the gradient, from where the shard says that it has it."""
        if talk.gradient is not None:
            if talk.begun:
                yield lambda: reading.acknowledged or reading.ended
            for run in self._gradient_runs(talk, reading.progress if talk.begun else {}):
                if reading.complete or reading.ended:
                    break
                stream.up.send((run, talk.gradient))
                yield self._worker.loop.rng.uniform(0.0, 0.01)
        stream.up.send(END)

    def _gradient_runs(self, talk: Talk, there: Mapping[int, int]) -> Iterator[Run]:
        cluster, gradient = self._worker.cluster, talk.gradient
        assert gradient is not None
        for index in talk.pushed:
            if bit(gradient.present, cluster.truth.slices[index].parameter):
                yield from cluster.runs(index, there.get(index, 0))

    def _received(self, talk: Talk, reading: Reading, item: object) -> None:
        self._worker.links.answered(talk.begin.receiver)
        if isinstance(item, AdashardError):
            raise item
        if isinstance(item, Acknowledge):
            reading.progress = {one.slice: one.count for one in item.progress}
            reading.acknowledged, reading.complete = True, item.complete
            return
        worker, begin = self._worker, talk.begin
        worker.worker.check(begin.generation)
        if begin.generation < worker.promised:
            raise Violation(f"{worker.name} uses a reply of a generation older than it promised")
        if isinstance(item, Record):
            worker.worker.take_record(item, begin.step)
            worker.incoming = item
            return
        run, weights = cast(tuple[Run, Weights | None], item)
        self._take(reading, begin, run, weights)

    def _take(self, reading: Reading, begin: Begin, run: Run, weights: Weights | None) -> None:
        """Keeps the elements of a slice aside until it is whole."""
        if run.count == 0:
            self._worker.arrived(run.slice, None, begin.step)
            return
        if weights is None or weights.version != begin.step:
            raise Violation(f"a reply of step {begin.step} to {self._worker.name} has {weights}")
        coming = reading.coming.setdefault(run.slice, [])
        coming += [weights] * run.count
        if len(coming) == self._worker.cluster.truth.slices[run.slice].element_count:
            if len(set(coming)) != 1:
                raise Violation(f"slice {run.slice} comes in pieces of {set(coming)}")
            self._worker.arrived(run.slice, weights, begin.step)

    def _check(self, begin: Begin) -> None:
        self._worker.worker.check(begin.generation)
