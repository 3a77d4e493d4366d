"""The registry: the truth about every job, one entry each, and the events of the cluster.

A coordinator may be slow, cut off or replaced at any moment, so nothing here trusts a lock or a
clock. An entry is changed only by compare-and-set on (generation, author): whoever decided on
something that has changed meanwhile fails, and knows it. The generation alone would not do, as
one is written twice in its life, before and after it is opened for the first time; the author
names the coordinator and counts its writes, so that no two writes share one.

This is kilobytes of metadata. Gradients, weights and optimizer state never come here, and steps
go on while the registry is away.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from itertools import islice
from typing import Protocol

from adashard.wire.messages import Entry
from adashard_server.cluster.statistics import Event

EVENTS_KEPT = 10_000

Identity = tuple[int, str]
"""Generation and author of an entry: what is compared."""

ABSENT: Identity = (0, "")
"""Compared for a job that does not exist yet."""


def identity_of(entry: Entry | None) -> Identity:
    """Generation and author of what is stored; `ABSENT` where nothing is."""
    return ABSENT if entry is None else (entry.generation, entry.author)


def refuse_unnamed(entry: Entry) -> None:
    """Refuses an entry that would be taken for none.

    Raises:
        ValueError: it has no generation or no author; a mistake in the program.
    """
    if entry.generation < 1 or not entry.author:
        raise ValueError(
            f"an entry of {entry.job!r} was to be written without generation or author"
        )


class Registry(Protocol):
    """The truth about every job: one entry each, changed only by compare-and-set.

    Calls may block, and may come from any thread. Each is done as a whole or not at all. One
    that raises `CannotReachServer` may have been done nevertheless: only its answer is known to
    be lost, so read again and compare the author.
    """

    name: str
    """Which form it is, for people: "memory" or "redis"."""

    def jobs(self) -> list[str]:
        """The names of all jobs, sorted."""

    def read(self, job: str) -> Entry | None:
        """The entry of `job`; None if there is no such job."""

    def swap(self, entry: Entry, *, expected: Identity) -> bool:
        """Stores `entry` if (generation, author) of what is stored equals `expected`.

        Returns:
            Whether it was stored. A repeated swap fails, as it finds itself.
        """

    def remove(self, job: str, *, expected: Identity) -> bool:
        """Forgets `job` if (generation, author) of what is stored equals `expected`.

        Returns:
            Whether it was removed.
        """

    def append_event(
        self, job: str, name: str, text: str, facts: Mapping[str, str], time_s: float
    ) -> int:
        """Adds an event to the log, which keeps the newest `EVENTS_KEPT`.

        Args:
            job: the job it is about; empty for the whole cluster.
            name: which kind of event, a constant.
            text: the line for people.
            facts: the same as fields.
            time_s: when, in seconds since 1970.

        Returns:
            Its sequence number: 1 or more, ascending over the whole cluster, never used again.
        """

    def events(self, after: int = 0, limit: int = 1000) -> list[Event]:
        """The first `limit` events with a sequence number above `after`, oldest first."""

    def close(self) -> None:
        """Lets go of connections. Nothing is called afterwards."""


class MemoryRegistry(Registry):
    """A registry that ends with its process: for one machine, notebooks and tests.

    Args:
        events_kept: length of the log of events.
    """

    name = "memory"

    def __init__(self, *, events_kept: int = EVENTS_KEPT) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._events: deque[Event] = deque(maxlen=events_kept)
        self._sequence = 0

    def jobs(self) -> list[str]:
        """The names of all jobs, sorted."""
        with self._lock:
            return sorted(self._entries)

    def read(self, job: str) -> Entry | None:
        """The entry of `job`; None if there is no such job."""
        with self._lock:
            return self._entries.get(job)

    def swap(self, entry: Entry, *, expected: Identity) -> bool:
        """As `Registry.swap`."""
        refuse_unnamed(entry)
        with self._lock:
            if identity_of(self._entries.get(entry.job)) != expected:
                return False
            self._entries[entry.job] = entry
            return True

    def remove(self, job: str, *, expected: Identity) -> bool:
        """As `Registry.remove`."""
        with self._lock:
            stored = self._entries.get(job)
            if stored is None or identity_of(stored) != expected:
                return False
            del self._entries[job]
            return True

    def append_event(
        self, job: str, name: str, text: str, facts: Mapping[str, str], time_s: float
    ) -> int:
        """As `Registry.append_event`."""
        with self._lock:
            self._sequence += 1
            self._events.append(
                Event(
                    sequence=self._sequence,
                    time_s=time_s,
                    job=job,
                    name=name,
                    text=text,
                    facts=dict(facts),
                )
            )
            return self._sequence

    def events(self, after: int = 0, limit: int = 1000) -> list[Event]:
        """As `Registry.events`."""
        with self._lock:
            return list(islice((e for e in self._events if e.sequence > after), limit))

    def close(self) -> None:
        """Does nothing."""
