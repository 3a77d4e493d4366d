"""Who is in a job's next generation, and why it cannot be made yet (rules C3, C7). Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from adashard.wire.messages import Entry, Member
from adashard.wire.placement import cut
from adashard_server.cluster.instructions import Announce
from adashard_server.cluster.planner import place


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a job sees of the cluster at one moment.

    Attributes:
        shards: ids and addresses of the shards that take slices, in the order they joined.
        dead: members of any kind whose lease has ended.
        silent: those of the dead whose control stream stands: they may only be slow.
        given_up: dead shards that are not waited for any longer.
        min_shards: shards that the first generation needs.
    """

    shards: Mapping[str, str]
    dead: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()
    given_up: frozenset[str] = frozenset()
    min_shards: int = 1


@dataclass(frozen=True, slots=True)
class Start:
    """What a job begins with: the optimizer state of a version, or fresh state of version 0.

    Attributes:
        version: the steps that have led to it.
        fingerprint: of the state; empty for fresh state.
    """

    version: int = 0
    fingerprint: str = ""


FRESH = Start()


def deaths(entry: Entry, around: Surroundings, gone: Collection[str]) -> list[Announce]:
    """Who is not in the next generation because it has died.

    Args:
        entry: the generation before.
        around: who is there.
        gone: ids of workers that have left it properly.
    """
    job = entry.job
    workers = [
        Announce(job, "died", f"worker {one.id} (rank {one.rank}) is gone", {"worker": one.id})
        for one in entry.workers
        if one.id in around.dead and one.id not in gone
    ]
    shards = [
        Announce(job, "died", f"shard {one.id} is gone", {"shard": one.id})
        for one in entry.shards
        if one.id in around.dead
    ]
    return workers + shards


def next_workers(
    entry: Entry,
    around: Surroundings,
    *,
    joiners: Sequence[str],
    leaving: Collection[str],
    gone: Collection[str],
) -> list[Member]:
    """Workers of the next generation, in rank order; a rank is given once and never changed (G2).

    Args:
        entry: the generation before.
        around: who is there.
        joiners: ids of workers that wait to take part, in the order they came.
        leaving: ids of workers that have said that they leave.
        gone: ids of leavers that have been let go.
    """
    staying = [
        replace(worker, leaving=worker.id in leaving)
        for worker in entry.workers
        if worker.id not in around.dead and worker.id not in gone
    ]
    new = [Member(id=joiner, rank=entry.next_rank + n) for n, joiner in enumerate(joiners)]
    return staying + new


def next_shards(entry: Entry, around: Surroundings) -> list[tuple[str, Member]]:
    """Shards of the next generation, each with the id of the one whose slices it takes.

    A job that begins takes all there are. Later, the ones that live stay, and a dead one is
    followed by a process that is new here: the launcher's next start of it, most likely.
    """
    if entry.lineage is None or not entry.shards:
        return [(id_, Member(id=id_, address=address)) for id_, address in around.shards.items()]
    known = {shard.id for shard in entry.shards}
    new = (Member(id=i, address=address) for i, address in around.shards.items() if i not in known)
    followers = (
        (shard.id, shard if shard.id not in around.dead else next(new, None))
        for shard in entry.shards
    )
    return [(before, shard) for before, shard in followers if shard is not None]


def next_placement(entry: Entry, shards: Sequence[tuple[str, Member]]) -> tuple[int, ...]:
    """Where slices go: to whoever follows the shard that had them, others as evenly as it goes."""
    follower = {before: shard.id for before, shard in shards}
    previous = {
        index: follower[entry.shards[owner].id]
        for index, owner in enumerate(entry.placement)
        if entry.shards[owner].id in follower
    }
    return place(cut(entry.spec), [shard.id for _, shard in shards], previous=previous)


def waits_for_shards(entry: Entry, around: Surroundings) -> str:
    """Which shard has to come before a generation can be made; empty for none."""
    if not entry.shards or entry.lineage is None:
        return "" if around.shards else "no shard is there"
    followed = next_shards(entry, around)
    if not followed:
        return "all shards of the job are gone: waiting for one to come"
    missing = {shard.id for shard in entry.shards} - {before for before, _ in followed}
    waiting = sorted(missing - around.given_up)
    return f"shard {waiting[0]} is gone: waiting for it to come back" if waiting else ""


def waits_for_beginners(entry: Entry, around: Surroundings, workers: Sequence[Member]) -> str:
    """What the first step of a job still needs; empty for nothing (C7), or if it was restored."""
    if entry.lineage is not None or entry.opened:
        return ""
    if len(around.shards) < around.min_shards:
        return f"the first step needs {around.min_shards} shards; {len(around.shards)} are there"
    live, needed = sum(not worker.leaving for worker in workers), entry.spec.min_workers
    return f"the first step needs {needed} workers; {live} are there" if live < needed else ""


def waits_for_holder(entry: Entry, around: Surroundings, versions: Mapping[str, int]) -> str:
    """The silent worker without whom state would be lost; empty for none.

    Args:
        entry: the generation before.
        around: who is there; some of its shards have died, or are not yet filled.
        versions: the version that each member holds whole, as it last told.
    """
    holders = [worker.id for worker in entry.workers if versions.get(worker.id, -1) >= 0]
    silent = [worker for worker in holders if worker in around.silent]
    if not silent or any(worker not in around.dead for worker in holders):
        return ""
    return f"worker {silent[0]} is silent, and it alone holds what a dead shard held: waiting"
