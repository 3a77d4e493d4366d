"""Who is still there: leases with an end, by member. Pure; the clock is passed in."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from adashard.wire.errors import InvalidSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseSettings:
    """Times of membership, in seconds.

    Attributes:
        lease_s: a member that is silent for so long counts as dead.
        grace_s: one whose control stream has broken, for so long.
        renew_s: between two renewals of a member.
        replace_after_s: how long a dead shard is waited for before the others take its slices:
            longer than a process needs to start and import torch on a machine that is busy.
    """

    lease_s: float = 15.0
    grace_s: float = 2.0
    renew_s: float = 1.0
    replace_after_s: float = 10.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not (math.isfinite(value) and value > 0.0):
                raise InvalidSettings(
                    f"{one.name}={value}: a time in seconds, more than 0",
                    remedy=f"Choose another --{one.name.replace('_', '-')}.",
                )
        if self.renew_s * 3 > self.lease_s:
            raise InvalidSettings(
                f"renew_s={self.renew_s:g} is more than a third of lease_s={self.lease_s:g}: two "
                "lost renewals would end a lease",
                remedy="Choose a longer --lease-s, or a shorter --renew-s.",
            )


RETURN_S = 3.0
"""Beyond the grace: how long a member may take to find a coordinator that has begun anew."""


class Leases:
    """Leases of all members. Decides only *when* a generation is made, never what is accepted."""

    def __init__(self, settings: LeaseSettings) -> None:
        self._settings = settings
        self._ends: dict[str, float] = {}
        self._renewed: dict[str, float] = {}
        self._revoked: set[str] = set()
        self._ticked: float | None = None

    def __contains__(self, member: str) -> bool:
        """Whether the member has a lease, be it that it has ended."""
        return member in self._ends

    def renew(self, member: str, now: float) -> None:
        """The member has been heard: it lives, also if it was dead, but not if it was evicted."""
        if member not in self._revoked:
            self._ends[member] = now + self._settings.lease_s
            self._renewed[member] = now

    def expect(self, member: str, now: float) -> None:
        """The member has been told of, and has the time to come that one needs who lives (C1)."""
        time_s = min(self._settings.lease_s, self._settings.grace_s + RETURN_S)
        if member not in self._revoked:
            self._ends[member] = max(self._ends.get(member, now), now + time_s)

    def revoke(self, member: str, now: float) -> None:
        """The member counts as dead from now on, whatever it says. Idempotent."""
        if member not in self._revoked:
            self._revoked.add(member)
            self._ends[member] = min(self._ends.get(member, now), now)

    def broken(self, member: str, now: float) -> None:
        """The member's stream has broken: it has the grace period to come back."""
        if member in self._ends:
            self._ends[member] = min(self._ends[member], now + self._settings.grace_s)

    def forget(self, member: str) -> None:
        """The member has gone for good. Idempotent."""
        self._ends.pop(member, None)
        self._renewed.pop(member, None)
        self._revoked.discard(member)

    def tick(self, now: float) -> None:
        """Time has passed. After a pause of our own nobody could renew: all leases start again."""
        if self._ticked is not None and now - self._ticked > self._settings.lease_s / 3:
            for member in self._ends.keys() - self._revoked:
                self._ends[member] = now + self._settings.lease_s
        self._ticked = now

    def dead(self, now: float) -> frozenset[str]:
        """Members whose lease has ended."""
        return frozenset(member for member, end in self._ends.items() if end <= now)

    def dead_since_s(self, member: str, now: float) -> float:
        """Seconds since the member's lease ended; 0 while it lives."""
        return max(0.0, now - self._ends.get(member, now))

    def silent_s(self, member: str, now: float) -> float:
        """Seconds since the member was last heard."""
        return now - self._renewed.get(member, now)
