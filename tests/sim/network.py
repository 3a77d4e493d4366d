"""What lies between processes: streams in order until they are cut, and calls that get lost.

Two processes that are parted hear nothing of each other for a while: what one sends arrives when
they are joined again, as TCP would have it, unless the stream is given up before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from math import isinf

from tests.sim.clockwork import Loop, Process, Wish

END = "end of stream"
KEEPALIVE_S = 3.0  # after which a stream between two parted processes is given up


class Broken(Exception):
    """A stream has broken; what was under way in it is lost."""


class Network:
    """Delays, losses and partitions. `rough` is false once the faults are over."""

    def __init__(self, loop: Loop, *, rough: bool) -> None:
        self.loop = loop
        self.rough = rough
        self.streams: dict[Stream, None] = {}  # in the order of their beginning
        self._parted: dict[frozenset[str], float] = {}

    def delay_s(self) -> float:
        """How long a message is under way: a few milliseconds, now and then a second."""
        rng = self.loop.rng
        slow = self.rough and rng.random() < 0.02
        return rng.uniform(0.05, 1.0) if slow else rng.uniform(0.001, 0.02)

    def mishap(self, probability: float) -> bool:
        """Whether something is lost or doubled now."""
        return self.rough and self.loop.rng.random() < probability

    def part(self, one: Process, other: Process, until_s: float) -> None:
        """Lets nothing through between two processes for a while."""
        self._parted[frozenset((one.name, other.name))] = until_s
        for stream in [*self.streams]:
            if {stream.caller, stream.server} == {one, other}:
                stream.stalls(until_s)

    def parted_until(self, one: Process, other: Process) -> float:
        """When the two reach each other, or reached."""
        if not self._parted:
            return 0.0
        return self._parted.get(frozenset((one.name, other.name)), 0.0)

    def heal(self) -> None:
        """Nothing is lost any more, and who is parted for a while is joined; others stay apart."""
        self.rough = False
        self._parted = {ends: until for ends, until in self._parted.items() if isinf(until)}

    def call(self, caller: Process, server: Process, action: Callable[[], object]) -> None:
        """A message on its own: it may be lost, doubled, late, and overtake another."""
        for _ in range(2 if self.mishap(0.1) else 1):
            parted = self.parted_until(caller, server) > self.loop.now
            if not parted and not self.mishap(0.2):
                server.after(self.delay_s(), action)

    def drop(self, process: Process) -> None:
        """A process has died: whoever talks with it hears of that."""
        for stream in [*self.streams]:
            if process in (stream.caller, stream.server):
                stream.left_by(process)


class Pipe:
    """One direction of a stream: in order, until it is cut."""

    def __init__(self, network: Network, writer: Process, reader: Process) -> None:
        self._network, self._writer, self._reader = network, writer, reader
        self._inbox: deque[object] = deque()
        self._last = 0.0
        self._cut = False
        self._ended = False

    def send(self, item: object) -> None:
        if not self._cut:
            self._after(lambda: self._arrive(item))

    def cut(self) -> None:
        """What is under way is lost; the reader learns of it a little later."""
        if not self._cut:
            self._cut = True
            loop, parted = self._reader.loop, self._network.parted_until(self._writer, self._reader)
            notice_s = self._network.delay_s()
            if parted > loop.now:
                notice_s = min(parted - loop.now, KEEPALIVE_S)
            self._reader.after(notice_s, self._end)

    def finish(self) -> None:
        """What is under way arrives, and then nothing more."""
        if not self._cut:
            self._after(self._end)
            self.give_up_at(self._reader.loop.now + KEEPALIVE_S)

    def give_up_at(self, time_s: float) -> None:
        self._reader.loop.at(time_s, self._reader, self._give_up)

    def next(self) -> Generator[Wish, None, object]:
        """Waits for the next item.

        Raises:
            Broken: there will be none.
        """
        if not self._inbox:
            yield lambda: bool(self._inbox) or self._ended
        if not self._inbox:
            raise Broken
        return self._inbox.popleft()

    def _after(self, action: Callable[[], object]) -> None:
        loop = self._reader.loop
        parted = self._network.parted_until(self._writer, self._reader)
        self._last = max(self._last, max(loop.now, parted) + self._network.delay_s())
        if not isinf(self._last):
            loop.at(self._last, self._reader, action)

    def _arrive(self, item: object) -> None:
        if not self._cut:
            self._inbox.append(item)

    def _end(self) -> None:
        self._ended = True

    def _give_up(self) -> None:
        self._cut = self._ended = True


class Stream:
    """Both directions between two processes, `up` towards the one that serves."""

    def __init__(self, network: Network, caller: Process, server: Process) -> None:
        self.caller, self.server = caller, server
        self.up, self.down = Pipe(network, caller, server), Pipe(network, server, caller)
        self._network = network
        network.streams[self] = None
        until_s = network.parted_until(caller, server)
        if not server.alive:
            self.cut()
        elif until_s > network.loop.now:
            self.stalls(until_s)

    def cut(self) -> None:
        self.up.cut()
        self.down.cut()
        self.close()

    def close(self) -> None:
        """Nobody is to break it any more. Idempotent."""
        self._network.streams.pop(self, None)

    def stalls(self, until_s: float) -> None:
        """Nothing comes through until then; a stream is given up before that if it is long."""
        give_up = self._network.loop.now + KEEPALIVE_S
        if give_up < until_s:
            self.up.give_up_at(give_up)
            self.down.give_up_at(give_up)

    def lose_answers(self) -> None:
        """The caller takes it for broken, while what it has sent goes on to arrive."""
        self.down.cut()

    def left_by(self, process: Process) -> None:
        """One end has died; what it had sent may or may not have left it."""
        for pipe in (self.up, self.down):
            if self._network.loop.rng.random() < 0.5:
                pipe.cut()
            else:
                pipe.finish()
        self.close()
