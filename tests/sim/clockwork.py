"""Virtual time: events, and processes that they happen to. One seed, one course of things.

A process has tasks, as threads would run them: generators that yield either seconds to pass or a
condition to wait for. Everything that happens to a process is an event of its own, and after
every event its waiting tasks look again.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Generator

Wish = float | Callable[[], bool]
Task = Generator[Wish, None, None]


class Loop:
    """The clock and what is to happen, in order of time."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.events = 0
        self._heap: list[tuple[float, int, Process, Callable[[], object]]] = []
        self._count = 0

    def at(self, time_s: float, process: Process, action: Callable[[], object]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (time_s, self._count, process, action))

    def next(self) -> Process | None:
        """Lets the next event happen; its process, unless that is dead or paused."""
        self.now, _, process, action = heapq.heappop(self._heap)
        if not process.alive:
            return None
        if process.paused_until > self.now:
            process.postponed.append(action)
            return None
        self.events += 1
        action()
        process.wake()
        return process


class Process:
    """Something that runs, and can be paused or killed at any moment."""

    def __init__(self, loop: Loop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.alive = True
        self.paused_until = 0.0
        self.postponed: list[Callable[[], object]] = []
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
        ready = bool(self._waiting)
        while ready and self.alive:
            ready = False
            for one in list(self._waiting):
                if one in self._waiting and one[0]():
                    self._waiting.remove(one)
                    self._advance(one[1])
                    ready = True

    def pause(self, duration_s: float) -> None:
        """Nothing happens to it for a while; what comes meanwhile waits, in its order."""
        self.paused_until = max(self.paused_until, self.loop.now + duration_s)
        self.loop.at(self.paused_until, self, self._resume)

    def _resume(self) -> None:
        postponed, self.postponed = self.postponed, []
        for action in postponed:
            self.loop.at(self.loop.now, self, action)

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
