"""Who is evicted where two members are alive and cannot reach each other (rule C9). Pure.

Each member reports whom it cannot reach. A lease says nothing of that: both renew it, and their
job would wait for ever. One of the two has to go, and the one that more others cannot reach
either is the likelier cause.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from adashard.wire.errors import LeaseExpired

LEASES = 3
"""For so many leases a request stays unacknowledged before its link counts as broken."""


def broken_links(reports: Mapping[str, Collection[str]], living: Collection[str]) -> dict[str, int]:
    """By member, to how many others its link is broken, whoever of the two has said so.

    Args:
        reports: by member, whom it cannot reach.
        living: members whose lease has not ended; links to and from others do not count.
    """
    links = {
        frozenset((member, peer))
        for member, peers in reports.items()
        for peer in peers
        if member != peer and member in living and peer in living
    }
    return {
        member: count for member in living if (count := sum(member in link for link in links)) > 0
    }


def to_evict(
    reports: Mapping[str, Collection[str]], living: Mapping[str, bool]
) -> tuple[str, int] | None:
    """The member to evict, and how many of its links are broken; None while no link is.

    Args:
        reports: by member, whom it cannot reach.
        living: whether a member is a worker, by id, the oldest first; only those that live.

    Returns:
        The member with most broken links; of several a worker before a shard, then the youngest.
    """
    counts = broken_links(reports, living)
    if not counts:
        return None
    age = {member: index for index, member in enumerate(living)}
    worst = max(counts, key=lambda member: (counts[member], living[member], age[member]))
    return worst, counts[worst]


def reason(member: str, count: int, lease_s: float) -> LeaseExpired:
    """What a member reads that is evicted for so many broken links."""
    return LeaseExpired(
        f"{member} and {count} other members have not reached each other for "
        f"{LEASES * lease_s:g} s",
        remedy="Look at the network between them; a worker joins again at its next step().",
    )
