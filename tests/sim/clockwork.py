"""Virtual time: events, processes, and streams between them. One seed, one course of things.

A process has tasks, as threads would run them: generators that yield either seconds to pass or a
condition to wait for. Everything that happens to a process is an event of its own, and after
every event its waiting tasks look again.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Generator

Wish = float | Callable[[], bool]
Task = Generator[Wish, None, None]

END = "end of stream"


class Broken(Exception):
    """A stream has broken; what was under way in it is lost."""


class Loop:
    """The clock and what is to happen, in order of time."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.events = 0
        self.rough = True  # whether the network is slow at times
        self._heap: list[tuple[float, int, Process, Callable[[], object]]] = []
        self._count = 0

    def at(self, time_s: float, process: Process, action: Callable[[], object]) -> None:
        heapq.heappush(self._heap, (time_s, self.number(), process, action))

    def number(self) -> int:
        """A number that was never given before."""
        self._count += 1
        return self._count

    def next(self) -> Process | None:
        """Lets the next event happen; its process, if that is alive."""
        self.now, _, process, action = heapq.heappop(self._heap)
        if not process.alive:
            return None
        self.events += 1
        action()
        process.wake()
        return process

    def delay_s(self) -> float:
        """How long a message is under way: a few milliseconds, now and then a second."""
        slow = self.rough and self.rng.random() < 0.02
        return self.rng.uniform(0.05, 1.0) if slow else self.rng.uniform(0.001, 0.02)


class Process:
    """Something that runs and can be killed at any moment."""

    def __init__(self, loop: Loop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.alive = True
        self._waiting: list[tuple[Callable[[], bool], Task]] = []

    def after(self, delay_s: float, action: Callable[[], object]) -> None:
        self.loop.at(self.loop.now + delay_s, self, action)

    def start(self, task: Task) -> None:
        self.after(0.0, lambda: self._advance(task))

    def every(self, period_s: float, action: Callable[[], object]) -> Task:
        yield self.loop.rng.uniform(0.0, period_s)
        while True:
            action()
            yield period_s

    def wake(self) -> None:
        """Goes on with tasks until all of them wait."""
        ready = True
        while ready and self.alive:
            ready = False
            for one in list(self._waiting):
                if one in self._waiting and one[0]():
                    self._waiting.remove(one)
                    self._advance(one[1])
                    ready = True

    def kill(self) -> None:
        self.alive = False
        self._waiting.clear()

    def _advance(self, task: Task) -> None:
        if not self.alive:
            return
        try:
            wish = next(task)
        except StopIteration:
            return
        if callable(wish):
            self._waiting.append((wish, task))
        else:
            self.after(wish, lambda: self._advance(task))


class Pipe:
    """One direction of a stream: in order, until it is cut."""

    def __init__(self, reader: Process) -> None:
        self._reader = reader
        self._inbox: deque[object] = deque()
        self._last = 0.0
        self._cut = False
        self._ended = False

    def send(self, item: object) -> None:
        if self._cut:
            return
        loop = self._reader.loop
        self._last = max(self._last, loop.now + loop.delay_s())
        loop.at(self._last, self._reader, lambda: self._arrive(item))

    def cut(self) -> None:
        """What is under way is lost; the reader learns of it a little later."""
        if not self._cut:
            self._cut = True
            self._reader.after(self._reader.loop.delay_s(), self._end)

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

    def _arrive(self, item: object) -> None:
        if not self._cut:
            self._inbox.append(item)

    def _end(self) -> None:
        self._ended = True


class Stream:
    """Both directions between two processes, `up` towards the one that serves."""

    def __init__(self, caller: Process, server: Process) -> None:
        self.caller, self.server = caller, server
        self.order = caller.loop.number()
        self.up, self.down = Pipe(server), Pipe(caller)

    def cut(self) -> None:
        self.up.cut()
        self.down.cut()

    def lose_answers(self) -> None:
        """The caller takes it for broken, while what it has sent goes on to arrive."""
        self.down.cut()
