"""A turnstile: lets the frames of several workers' pushes through one by one, in a placed order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from adashard.transport.base import Call
from adashard.transport.grpc import GrpcTransport
from adashard.wire.frames import Frame, read_frame
from adashard.wire.messages import Begin

Stream = tuple[str, str]
"""A worker's id and a shard's."""

Choose = Callable[[Sequence[Stream]], Stream]
"""Which of the streams, in order, may send its next frame."""


class Turnstile:
    """Holds every frame until all streams of a step have one, and lets one of these go.

    While it is open, everything passes; it learns which streams there are. Once it is closed, a
    step is: all streams wait, one is chosen and sends a frame, the shard has read it, the next is
    chosen. A stream that has sent its last frame is not asked any more until the step has ended.

    Args:
        waits: whether the next frame goes only when the shard has read the one before. Where a
            shard stops reading, to be sent no more than it can hold, it would wait for ever.
    """

    def __init__(self, *, waits: bool = True) -> None:
        self.passed: list[Stream] = []
        self._waits = waits
        self._choose: Choose | None = None
        self._streams: set[Stream] = set()
        self._waiting: set[Stream] = set()
        self._ended: set[Stream] = set()
        self._chosen: Stream | None = None
        self._changed = threading.Condition()

    def close(self, choose: Choose) -> None:
        """From the next step on, frames go in this order."""
        with self._changed:
            self._choose = choose
            self.passed.clear()

    def open(self) -> None:
        """Lets everything go."""
        with self._changed:
            self._choose, self._chosen = None, None
            self._waiting.clear()
            self._changed.notify_all()

    # --- a worker's side ------------------------------------------------------------------------

    def transport(self) -> GrpcTransport:
        """The transport of a worker whose frames go through here."""
        return _Held(self)

    def hold(self, frames: Iterable[bytes]) -> Iterator[bytes]:
        """The frames of a stream, each when it is its turn."""
        stream: Stream | None = None
        for data in frames:
            if stream is None:
                begin = read_frame(data).leading
                assert isinstance(begin, Begin)
                stream = begin.sender, begin.receiver
            self._wait_turn(stream)
            yield data
        assert stream is not None
        self._end(stream)

    def _wait_turn(self, stream: Stream) -> None:
        with self._changed:
            self._streams.add(stream)
            if self._choose is None:
                return
            self._waiting.add(stream)
            self._choose_next()
            self._changed.wait_for(lambda: self._chosen == stream or self._choose is None)
            self._waiting.discard(stream)
            self.passed.append(stream)
            if not self._waits:
                self._chosen = None

    def _end(self, stream: Stream) -> None:
        with self._changed:
            if self._choose is None:
                return
            self._ended.add(stream)
            if self._ended == self._streams:
                self._ended.clear()
            self._choose_next()

    def _choose_next(self) -> None:
        """Chooses, where nobody is chosen and everybody is there that has not ended."""
        if self._choose is None or self._chosen is not None or not self._waiting:
            return
        if self._waiting | self._ended == self._streams:
            self._chosen = self._choose(sorted(self._waiting))
            self._changed.notify_all()

    # --- a shard's side -------------------------------------------------------------------------

    def read(self, data: bytes) -> Frame:
        """Reads a frame that has arrived at a shard, which makes room for the next."""
        frame = read_frame(data)
        with self._changed:
            if self._waits:
                self._chosen = None
                self._choose_next()
        return frame


class _Held(GrpcTransport):
    """A worker's transport, with its pushes held at the turnstile."""

    def __init__(self, turnstile: Turnstile) -> None:
        super().__init__()
        self._turnstile = turnstile

    def push_pull(self, address: str, frames: Iterable[bytes]) -> Call:
        return super().push_pull(address, self._turnstile.hold(frames))
