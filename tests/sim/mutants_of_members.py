"""What goes wrong between generations: who is a member, and where one begins."""

from __future__ import annotations

from dataclasses import replace

from tests.sim.member import Member
from tests.sim.mutants import Patch, mutant

from adashard.wire.control import Frozen, Stale
from adashard.wire.messages import Entry, Lineage, Plan, Record
from adashard.worker import Worker
from adashard_server.cluster import membership
from adashard_server.cluster.coordinator import Coordinator
from adashard_server.cluster.instructions import Instruction, StepDown
from adashard_server.cluster.leases import Leases
from adashard_server.cluster.membership import Membership
from adashard_server.cluster.recovery import Lost
from adashard_server.cluster.registry import Identity, MemoryRegistry
from adashard_server.cluster.succession import Surroundings

# --- where a generation begins -------------------------------------------------------------------


@mutant("shards")
def reconciling_asks_only_the_shards(patch: Patch) -> None:
    """C4: a worker may hold what every shard that had it has died with."""
    reconcile = membership.reconcile

    def ask_shards(
        entry: Entry, answers: dict[str, Frozen], record: Record | None = None
    ) -> Plan | Lost:
        shards = {shard.id for shard in entry.shards}
        theirs = {member: answer for member, answer in answers.items() if member in shards}
        know = any(answer.versions for answer in theirs.values())
        return reconcile(entry, theirs if know else answers, record)

    patch.setattr(membership, "reconcile", ask_shards)


@mutant("shards")
def one_worker_uploads_everything(patch: Patch) -> None:
    """C4: no one may have all slices at their highest version; the source is chosen per slice."""
    reconcile = membership.reconcile

    def ask_one(
        entry: Entry, answers: dict[str, Frozen], record: Record | None = None
    ) -> Plan | Lost:
        workers = {worker.id for worker in entry.workers if answers[worker.id].complete}
        others = workers - {min(workers, default="")}
        theirs = {member: answer for member, answer in answers.items() if member not in others}
        return reconcile(entry, theirs, record)

    patch.setattr(membership, "reconcile", ask_one)


@mutant("shards")
def only_a_complete_worker_holds_copies(patch: Patch) -> None:
    """W2: the answer to a freeze lists each slice, also those of a step that is half received."""
    freeze = Worker.freeze

    def hold_all_or_nothing(self: Worker, entry: Entry) -> Frozen | Stale:
        answer = freeze(self, entry)
        if isinstance(answer, Frozen) and len(set(answer.versions)) > 1:
            return replace(answer, slices=(), versions=(), record=None)
        return answer

    patch.setattr(Worker, "freeze", hold_all_or_nothing)


@mutant("joins")
def every_workers_own_weights_are_version_0(patch: Patch) -> None:
    """W1, C7: initial weights are copies only where the lineage names their worker."""
    become = Worker._become_origin

    def become_all_the_same(self: Worker, entry: Entry) -> None:
        lineage = entry.lineage
        if lineage is not None:
            entry = replace(entry, lineage=replace(lineage, origin=self.id))
        become(self, entry)

    patch.setattr(Worker, "_become_origin", become_all_the_same)


# --- members -------------------------------------------------------------------------------------


@mutant("workers")
def ranks_are_given_anew(patch: Patch) -> None:
    """G2: a rank is never changed and never used again."""
    next_workers = membership.next_workers

    def rerank(entry: Entry, around: Surroundings, **who: object) -> list[object]:
        workers = next_workers(entry, around, **who)  # type: ignore[arg-type]
        return [replace(worker, rank=rank) for rank, worker in enumerate(workers)]

    patch.setattr(membership, "next_workers", rerank)


@mutant("joins")
def a_leaver_is_let_go_at_once(patch: Patch) -> None:
    """C8: a leaver goes when the others have at least its version."""
    release = Membership._release

    def hurry(self: Membership, around: Surroundings) -> list[Instruction]:
        self.versions = dict.fromkeys(self.versions, 0)
        return release(self, around)

    patch.setattr(Membership, "_release", hurry)


@mutant("pauses")
def a_lease_that_ended_cannot_be_revived(patch: Patch) -> None:
    """C2: only the generation that leaves a member out makes it dead."""
    renew = Leases.renew

    def bury(self: Leases, member: str, now: float) -> None:
        if member not in self.dead(now):
            renew(self, member, now)

    patch.setattr(Leases, "renew", bury)


@mutant("links")
def a_broken_link_is_nobodys_business(patch: Patch) -> None:
    """C9: both ends are well, and their job would wait for ever."""
    patch.setattr(Coordinator, "_evict_unreachable", lambda self, around, now: [])


@mutant("coordinators")
def a_coordinator_writes_without_comparing(patch: Patch) -> None:
    """C1: whoever decided on something that has changed meanwhile must fail."""

    def write(self: MemoryRegistry, entry: Entry, *, expected: Identity) -> bool:
        self._entries[entry.job] = entry
        return True

    patch.setattr(MemoryRegistry, "swap", write)


@mutant("coordinators")
def a_coordinator_never_learns_that_it_was_replaced(patch: Patch) -> None:
    """C1: it ends when anybody shows it a higher generation, or its write fails."""
    swapped = Membership.swapped

    def go_on(self: Membership, done: bool, stored: Entry | None, now: float) -> list[Instruction]:
        told = swapped(self, True, stored, now)
        return [one for one in told if not isinstance(one, StepDown)]

    patch.setattr(Membership, "swapped", go_on)
    patch.setattr(Coordinator, "_overtaken", lambda self, member, job, promised: [])


@mutant("coordinators")
def an_embedded_registry_begins_anew(patch: Patch) -> None:
    """G1: members keep the newest entry, and a new coordinator goes on above it."""
    patch.setattr(Member, "entries", lambda self: ())


@mutant("disasters")
def a_restored_job_keeps_its_lineage(patch: Patch) -> None:
    """C5: an older, higher history must not come back, so a restore begins a lineage."""
    new_lineage = Membership._new_lineage

    def keep(self: Membership, entry: Entry) -> Lineage:
        return replace(new_lineage(self, entry), number=1)

    patch.setattr(Membership, "_new_lineage", keep)


@mutant("storm")
def a_lost_lineage_goes_on_from_anybodys_weights(patch: Patch) -> None:
    """C5: what is gone is said, and weights are never initialised again in silence."""
    restore = Membership.restore

    def begin_again(self: Membership, why: str) -> list[Instruction]:
        self.entry = replace(self.entry, opened=False)
        return restore(self, why)

    patch.setattr(Membership, "restore", begin_again)
