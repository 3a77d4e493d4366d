"""A worker's streams to shards: one to each, at the same time, each in a thread of its own.

What is asked of all shards together is a list of `Talk`s. A stream is repeated under its name while
its shard does not answer (rule W5). All of them end when one has failed for good, and when their
generation has ended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

from adashard.retry import Backoff, repeatable
from adashard.transport.base import Call, Transport
from adashard.wire.errors import AdashardError, ShardUnavailable, StaleGeneration
from adashard.wire.frames import Frame, leading_frame, read_frame
from adashard.wire.messages import Acknowledge, Begin, Member

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
        received: takes a frame of the answer; frames come in order, and begin again with the first
            slice that is not whole where a stream is repeated. Called under the lock.
        whole: whether everything that is wanted has come.
        gradient: the frames that follow `begin` in a push, made anew for every stream.
    """

    member: Member
    begin: Begin
    received: Callable[[Frame], None]
    whole: Callable[[], bool]
    gradient: Callable[[], Iterator[bytes]] | None = None


class Streams:
    """The streams under way of one session. `talk` belongs to one thread, the rest to any.

    Args:
        transport: reaches the shards.
        job: for the log.
        changed: the session's lock, notified when a generation ends.
        check: raises `StaleGeneration` for a generation that has ended; called under the lock.
    """

    def __init__(
        self,
        transport: Transport,
        job: str,
        changed: threading.Condition,
        check: Callable[[int], None],
    ) -> None:
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
                return self._stream(talk, first=backoff.attempts == 0)
            except AdashardError as error:
                wait_s = backoff.next_s() if repeatable(error) else None
                if wait_s is None:
                    self._fail()
                    raise
                log.debug("job %r: %s; attempt %d", self._job, error.message, backoff.attempts)
                with self._changed:
                    self._changed.wait_for(partial(self._is_over, generation), wait_s)
                    self._check(generation)

    def _stream(self, talk: Talk, *, first: bool) -> None:
        acknowledged = threading.Event()
        complete = threading.Event()

        def frames() -> Iterator[bytes]:
            yield leading_frame(talk.begin)
            if talk.gradient is None:
                return
            if not first:
                acknowledged.wait()  # a repeated push first hears whether it is needed
            for frame in talk.gradient():
                if complete.is_set():
                    return
                yield frame

        call = self._transport.push_pull(talk.member.address, frames())
        try:
            self._register(call, talk.begin.generation)
            for data in call:
                frame = read_frame(data)
                if isinstance(frame.leading, Acknowledge):
                    if frame.leading.complete:
                        complete.set()
                    acknowledged.set()
                else:
                    self._received(talk, frame)
        finally:
            call.cancel()
            acknowledged.set()
            with self._changed:
                self._calls.discard(call)
        if not talk.whole():
            name = f"{talk.member.id} at {talk.member.address}"
            raise ShardUnavailable(f"shard {name} ended a reply too early")

    def _received(self, talk: Talk, frame: Frame) -> None:
        with self._changed:
            self._check_generation(talk.begin.generation)
            talk.received(frame)

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
