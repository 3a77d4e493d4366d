"""A worker's streams to shards: one to each, at the same time, each in a thread of its own.

What is asked of all shards together is a list of `Talk`s. A stream is repeated under its name while
its shard does not answer (rule W5). All of them end when one has failed for good, and when their
generation has ended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

from adashard import failpoints
from adashard.arrivals import Arrival, Arrivals, Part
from adashard.retry import Backoff, repeatable
from adashard.transport.base import Call, Transport
from adashard.transport.links import Links
from adashard.wire.errors import AdashardError, ShardUnavailable, StaleGeneration
from adashard.wire.frames import Frame, leading_frame, read_frame
from adashard.wire.messages import Acknowledge, Begin, Content, Member, Record

log = logging.getLogger("adashard")

STREAM_BUDGET_S = 120.0
STREAMS_MAX = 512  # one for each shard at once; threads are made when needed
SAY_S = 3.0  # what takes longer than this says what it waits for


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """What one shard is asked, and what becomes of its answer.

    Attributes:
        member: the shard.
        begin: what is asked of it.
        parts: what comes of a slice.
        received: takes the record, and each slice when it is whole, perhaps again where a stream is
            repeated. Called under the lock.
        whole: whether everything that is wanted has come.
        gradient: the frames that follow `begin` in a push, made anew for every stream; it is told
            how much of each slice is there already.
        begun: whether some of the gradient may be there already, from an earlier generation.
    """

    member: Member
    begin: Begin
    parts: Callable[[int], Mapping[Content, Part]]
    received: Callable[[Record | Arrival], None]
    whole: Callable[[], bool]
    gradient: Callable[[Mapping[int, int]], Iterator[bytes]] | None = None
    begun: bool = False


class Streams:
    """The streams under way of one session. `talk` belongs to one thread, the rest to any.

    Args:
        transport: reaches the shards.
        job: for the log.
        changed: the session's lock, notified when a generation ends.
        check: raises `StaleGeneration` for a generation that has ended; called under the lock.

    Attributes:
        links: which shards acknowledge what they are asked.
    """

    def __init__(
        self,
        transport: Transport,
        job: str,
        changed: threading.Condition,
        check: Callable[[int], None],
    ) -> None:
        self.links = Links(time.monotonic)
        self._transport, self._job = transport, job
        self._changed = changed
        self._check_generation = check
        self._calls: set[Call] = set()
        self._failed = False  # a stream of the talks at hand, for good
        self._threads = ThreadPoolExecutor(STREAMS_MAX, thread_name_prefix="adashard-stream")

    def talk(self, talks: Iterable[Talk], *, waiting: str) -> None:
        """Talks to several shards at once; returns when each has answered whole.

        Args:
            talks: one for each shard.
            waiting: what the log says where that takes long.

        Raises:
            StaleGeneration: the generation has ended meanwhile, here or at a shard.
            AdashardError: a shard has refused, or has not answered within the budget.
        """
        self._failed = False
        self._join([self._threads.submit(self._repeat, talk) for talk in talks], waiting)

    def start(self, action: Callable[[], None]) -> None:
        """Runs `action` in a thread beside the talks."""
        self._threads.submit(action)

    def cancel(self) -> None:
        """Ends every stream under way."""
        with self._changed:
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def close(self) -> None:
        """Begins no more streams. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- the caller's thread --------------------------------------------------------------------

    def _join(self, streams: list[Future[None]], waiting: str) -> None:
        """Waits for all streams, also where one has failed; raises what matters most."""
        said = False
        try:
            while wait(streams, SAY_S).not_done:
                if not said:
                    said = True
                    log.info("job %r: %s", self._job, waiting)
        except BaseException:
            self._fail()
            wait(streams)
            raise
        errors = [error for stream in streams if (error := stream.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, StaleGeneration)):
            raise error

    # --- a stream's thread ----------------------------------------------------------------------

    def _repeat(self, talk: Talk) -> None:
        """One shard's part, repeated under the same name while nobody answers."""
        backoff = Backoff(STREAM_BUDGET_S, time.monotonic)
        generation = talk.begin.generation
        while True:
            try:
                return self._stream(talk, first=not talk.begun and backoff.attempts == 0)
            except AdashardError as error:
                if not isinstance(error, ShardUnavailable):
                    self.links.answered(talk.member.id)  # a refusal is an answer as good as any
                wait_s = backoff.next_s() if repeatable(error) else None
                if wait_s is None:
                    self._fail()
                    raise
                log.debug("job %r: %s; attempt %d", self._job, error.message, backoff.attempts)
                with self._changed:
                    self._changed.wait_for(partial(self._is_over, generation), wait_s)
                    self._check(generation)

    def _stream(self, talk: Talk, *, first: bool) -> None:
        sending = _Sending(talk, first=first)
        arrivals = Arrivals(talk.parts)
        failpoints.reach("push.begin")
        self.links.asked(talk.member.id, (talk.begin.generation, talk.begin.step))
        call = self._transport.push_pull(talk.member.address, sending.frames())
        try:
            self._register(call, talk.begin.generation)
            for data in call:
                self.links.answered(talk.member.id)
                frame = read_frame(data)
                if isinstance(frame.leading, Acknowledge):
                    sending.acknowledged(frame.leading)
                else:
                    failpoints.reach("reply.received")
                    self._received(talk, frame, arrivals)
        finally:
            call.cancel()
            sending.end()
            self.links.dropped(talk.member.id)
            with self._changed:
                self._calls.discard(call)
        if not talk.whole():
            name = f"{talk.member.id} at {talk.member.address}"
            raise ShardUnavailable(f"shard {name} ended a reply too early")

    def _received(self, talk: Talk, frame: Frame, arrivals: Arrivals) -> None:
        """Gathers what has come, and hands on under the lock what is whole."""
        if isinstance(frame.leading, Record):
            self._hand_on(talk, frame.leading)
        for run, buffer in frame.pieces():
            arrival = arrivals.take(run, buffer)
            if arrival is not None:
                self._hand_on(talk, arrival)

    def _hand_on(self, talk: Talk, came: Record | Arrival) -> None:
        with self._changed:
            self._check_generation(talk.begin.generation)
            talk.received(came)

    def _register(self, call: Call, generation: int) -> None:
        with self._changed:
            self._calls.add(call)
            self._check(generation)

    def _check(self, generation: int) -> None:
        """Refuses to go on in a generation that has ended, or where another stream has failed."""
        self._check_generation(generation)
        if self._failed:
            raise StaleGeneration("another stream of this step has failed")

    def _is_over(self, generation: int) -> bool:
        try:
            self._check(generation)
        except StaleGeneration:
            return True
        return False

    def _fail(self) -> None:
        """Ends all streams of these talks, also those that have not begun."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()
        self.cancel()


class _Sending:
    """What a stream sends, in the thread of the transport, while its own thread reads the answer.

    Args:
        talk: says what.
        first: whether nothing of the gradient can be there yet; otherwise the shard says first
            what it still needs.
    """

    def __init__(self, talk: Talk, *, first: bool) -> None:
        self._talk, self._first = talk, first
        self._heard = threading.Event()
        self._ended = threading.Event()  # nothing more of the gradient is needed
        self._there: Mapping[int, int] = {}

    def frames(self) -> Iterator[bytes]:
        """All frames of the stream."""
        yield leading_frame(self._talk.begin)
        if self._talk.gradient is None:
            return
        if not self._first:
            self._heard.wait()
        for frame in self._talk.gradient({} if self._first else self._there):
            if self._ended.is_set():
                return
            failpoints.reach("push.frame")
            yield frame
        failpoints.reach("push.end")

    def acknowledged(self, answer: Acknowledge) -> None:
        """The shard has said what it has."""
        if not self._heard.is_set():
            self._there = {one.slice: one.count for one in answer.progress}
        if answer.complete:
            self._ended.set()
        self._heard.set()

    def end(self) -> None:
        """The stream is over, and a wait for its answer as well."""
        self._ended.set()
        self._heard.set()
