"""Jobs whose members know more of them than the registry does: they bring it along (C1). Pure.

A coordinator that keeps the registry in its memory leaves nothing behind when it dies, and a Redis
that was killed may come back with less than it held. Each member has kept the newest entry that it
was told, and hands it to the next coordinator in its hello. While that one has written nothing of
the job, the newest entry goes on. The write is compared with what was read from the registry, so
that a coordinator which only was not up to date fails as it should.

Two generations of one number would be mixed up (rule G1). The number of the first generation is
above all that its members have promised, because it is chosen only when every member of the entry
has said hello, or has had the time that one needs who lives. Members that no entry names
yet, since only they had heard of a generation that was being made, have the grace to come; a
higher entry that one of them brings is taken over in turn.

Whoever comes after that with a higher generation is not in ours. Where others may write to the
registry, that ends this coordinator, and the next takes over what is brought. Where nobody else
can, the generation was never opened, or it is of a part of the cluster that was silent for a whole
lease, and the next coordinator would know no more than this one. So its member is turned away with
`LeaseExpired`. It has promised more than we ask, hence takes part in nothing of ours; a worker
joins again under a new id, and a shard forgets the job.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, MutableMapping
from dataclasses import replace

from adashard.wire.errors import InvalidRequest, Overloaded
from adashard.wire.messages import Entry
from adashard.wire.placement import WORKERS_MAX, cut, validate_spec
from adashard_server.cluster.instructions import Announce, HangUp, Instruction
from adashard_server.cluster.jobs import JOBS_MAX, SHARDS_MAX, check_name
from adashard_server.cluster.leases import Leases
from adashard_server.cluster.membership import Membership
from adashard_server.cluster.planner import check_placement


class Takeovers:
    """Jobs that are being taken over. Not thread-safe.

    Args:
        jobs: the coordinator's, by name.
        leases: the coordinator's.
        make: a job's membership, from its entry.
        grace_s: how long members have to come that no entry names yet.
    """

    def __init__(
        self,
        jobs: MutableMapping[str, Membership],
        leases: Leases,
        make: Callable[[Entry], Membership],
        grace_s: float,
    ) -> None:
        self._jobs, self._leases, self._make = jobs, leases, make
        self._grace_s = grace_s
        self._since: dict[str, float] = {}

    def offered(self, entry: Entry, member: str, now: float) -> list[Instruction]:
        """A member brings what it knows of a job; it counts where that is more than we know.

        Raises:
            InvalidRequest: no coordinator has written that, or the member is not in it.
            Overloaded: there are as many jobs as are allowed.
        """
        membership = self._jobs.get(entry.job)
        if membership is not None and not _goes_before(entry, membership):
            return []
        check_entry(entry, member)
        if membership is None:
            if len(self._jobs) >= JOBS_MAX:
                raise Overloaded(f"the cluster has {JOBS_MAX} jobs, the most that are allowed")
            membership = self._jobs[entry.job] = self._make(replace(entry, author=""))
        again = [HangUp(joiner) for joiner in membership.joiners if joiner != member]
        membership.adopt(entry)
        self._since.setdefault(entry.job, now)
        for one in membership.members:
            self._leases.expect(one.id, now)
        text = f"generation {entry.generation} is taken over from member {member}"
        facts = {"generation": str(entry.generation)}
        return [Announce(entry.job, "taken_over", text, facts), *again]

    def is_over(self, membership: Membership, accounted: Collection[str], now: float) -> bool:
        """Whether generations of a job may be made: its members have had time to come.

        Args:
            membership: the job's.
            accounted: members that have said hello or whose lease has ended.
            now: seconds.
        """
        job = membership.entry.job
        if job not in self._since:
            return True
        missing = {member.id for member in membership.members} - set(accounted)
        if missing or now - self._since[job] < self._grace_s:
            return False
        del self._since[job]
        return True


def _goes_before(entry: Entry, membership: Membership) -> bool:
    """Whether we have written nothing of a job, and `entry` is newer than what is known of it."""
    known = membership.entry
    newer = (entry.generation, entry.opened) > (known.generation, known.opened)
    return newer and not membership.written


def check_entry(entry: Entry, member: str) -> None:
    """Refuses an entry that no coordinator has written, or that is none of the member's business.

    Raises:
        InvalidRequest: it cannot be right.
    """
    check_name(entry.job)
    validate_spec(entry.spec)
    if member not in {one.id for one in (*entry.workers, *entry.shards)}:
        raise InvalidRequest(f"{member} brings an entry of job {entry.job!r} and is not in it")
    if (
        entry.generation < 1
        or entry.lineage is None
        or not 0 < len(entry.shards) <= SHARDS_MAX
        or len(entry.workers) > WORKERS_MAX
        or any(worker.rank >= entry.next_rank for worker in entry.workers)
    ):
        raise InvalidRequest(f"the entry of job {entry.job!r} that {member} brings is none")
    slice_count = len(cut(entry.spec))
    try:
        check_placement(entry.placement, slice_count=slice_count, shard_count=len(entry.shards))
    except ValueError as error:
        raise InvalidRequest(f"{member} brings a placement that cannot be: {error}") from None
