"""What a coordinator writes of one job, and what it means that a write has failed (C1). Pure.

Another author in the registry ends this coordinator. A registry that holds nothing, or something
older that we have read or written ourselves, has lost what came after: a Redis that was killed
comes back with what it had saved. Nobody else has written there, since only what is stored is ever
followed, so the write is repeated over what is left; it is compared and set like any other.
"""

from __future__ import annotations

from dataclasses import replace

from adashard.wire.messages import Entry
from adashard_server.cluster.instructions import Swap
from adashard_server.cluster.registry import ABSENT, identity_of


class Writes:
    """The writes of one coordinator to one job's entry. Not thread-safe.

    Args:
        author: the coordinator's id, new at every start.
        entry: as it was read; one without an author is not in the registry.

    Attributes:
        begun: whether anything has been written, or is being.
    """

    def __init__(self, author: str, entry: Entry) -> None:
        self.begun = False
        self._author, self._count = author, 0
        self._read = self._stored = identity_of(entry) if entry.author else ABSENT
        self._pending: Entry | None = None

    @property
    def pending(self) -> Entry | None:
        """What is being written; None while the registry has nothing to answer."""
        return self._pending

    def begin(self, entry: Entry) -> Swap:
        """A write of `entry`, which gets an author of its own."""
        self.begun = True
        self._count += 1
        self._pending = replace(entry, author=f"{self._author}/{self._count}")
        return Swap(self._pending, self._stored)

    def answered(self, done: bool, stored: Entry | None) -> Entry | Swap | None:
        """The registry has answered, possibly after a lost answer.

        Args:
            done: whether the write was done.
            stored: if not, what the registry holds.

        Returns:
            What is stored now; or the write to be repeated, over what an older state has left; or
            None where another coordinator has written.
        """
        pending = self._pending
        assert pending is not None
        if done or (stored is not None and stored.author == pending.author):
            self._stored, self._pending = identity_of(pending), None
            return pending
        if self._is_left(stored, pending):
            self._stored = identity_of(stored)
            return Swap(pending, self._stored)
        self._pending = None
        return None

    def _is_left(self, stored: Entry | None, pending: Entry) -> bool:
        """Whether what the registry holds is older than what we have seen there."""
        if stored is None or identity_of(stored) == self._read:
            return True
        ours = stored.author.rpartition("/")[0] == self._author
        return ours and stored.generation <= pending.generation
