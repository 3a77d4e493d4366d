"""Which members leave requests unacknowledged for too long (rule C9).

A request is acknowledged at once, however long the answer takes: a round that waits for others and
a link that is broken can be told apart. Both ends of a broken link may be well and renew their
leases; only they can say what is wrong, and the coordinator decides which of them goes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

LEASES = 3
REPEATED_S = 5.0  # requests are repeated about once a second; what is not is not wanted any more
_LEASE_S = 15.0  # until the coordinator has said how long it is


@dataclass(slots=True)
class _Asked:
    """A request to one member without an acknowledgement."""

    key: Hashable
    since: float
    last: float
    open_count: int = 1


class Links:
    """The newest request to each member, as long as it is not acknowledged. Thread-safe.

    Args:
        clock: seconds, monotonic.

    Attributes:
        lease_s: of the cluster, as the coordinator has said.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.lease_s = _LEASE_S
        self._clock = clock
        self._asked: dict[str, _Asked] = {}
        self._lock = threading.Lock()

    def asked(self, member: str, key: Hashable) -> None:
        """A request is about to be sent, for the first time or again.

        Args:
            member: to whom.
            key: what is asked: the same for a request that is repeated, another for the next.
        """
        with self._lock:
            now, known = self._clock(), self._asked.get(member)
            if known is None or known.key != key:
                self._asked[member] = _Asked(key, since=now, last=now)
            else:
                known.last = now
                known.open_count += 1

    def answered(self, member: str) -> None:
        """The member has said something: the link is whole. Idempotent."""
        with self._lock:
            self._asked.pop(member, None)

    def dropped(self, member: str) -> None:
        """A request has ended without an acknowledgement; it may be repeated. Idempotent."""
        with self._lock:
            known = self._asked.get(member)
            if known is not None and known.open_count:
                known.open_count -= 1

    def broken(self) -> tuple[str, ...]:
        """Members to whom a request is wanted and unacknowledged for three leases, sorted."""
        with self._lock:
            now = self._clock()
            return tuple(
                sorted(
                    member
                    for member, one in self._asked.items()
                    if now - one.since >= LEASES * self.lease_s
                    and (one.open_count or now - one.last <= REPEATED_S)
                )
            )
