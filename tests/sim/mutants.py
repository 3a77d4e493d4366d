"""Mistakes that look right: each is made by switching one rule off (docs/protocol.md).

Most of them were made by somebody. Each says which rule it breaks, and in which family of faults
the simulator is to see it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
from tests.sim.history import Weights
from tests.sim.member import Member
from tests.sim.shard import SimShard
from tests.sim.talks import Reading, Talk, Talks
from tests.sim.uploads import Uploads

from adashard.wire.control import Frozen, Stale
from adashard.wire.messages import Begin, Entry, Exchange, Plan, Record, Report, Run
from adashard.worker import Worker
from adashard_server.cluster import membership
from adashard_server.cluster.coordinator import Coordinator
from adashard_server.cluster.instructions import Instruction, StepDown
from adashard_server.cluster.leases import Leases
from adashard_server.cluster.membership import Membership
from adashard_server.cluster.recovery import Lost
from adashard_server.cluster.registry import Identity, MemoryRegistry
from adashard_server.cluster.succession import Surroundings
from adashard_server.shard.instructions import Add, Admission, Wait
from adashard_server.shard.rounds import Rounds
from adashard_server.shard.sums import Sums

Patch = pytest.MonkeyPatch


class Mutant(NamedTuple):
    """A mistake, and where it shows."""

    mistake: Callable[[Patch], None]
    family: str


MUTANTS: list[Mutant] = []


def mutant(family: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Adds a mistake to the list."""

    def added(mistake: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS.append(Mutant(mistake, family))
        return mistake

    return added


# --- the record, and who knows it ----------------------------------------------------------------


@mutant("shards")
def the_exchange_is_kept_by_shards_only(patch: Patch) -> None:
    """S7, W6: the record rides in replies, and workers answer a freeze with it."""
    patch.setattr(Worker, "_record_of", lambda self, version: None)


@mutant("joins")
def the_record_is_forgotten_at_the_commit(patch: Patch) -> None:
    """S7: the record of t is kept until that of t+1 replaces it."""
    patch.setattr(Rounds, "_record_of", lambda self, version: None)


@mutant("network")
def the_own_report_is_forgotten_at_the_commit(patch: Patch) -> None:
    """S6: another shard may still need it; one lost message is enough."""
    own_report = Rounds.own_report

    def forget(self: Rounds, step: int, exchange: Exchange) -> Report | None:
        return own_report(self, step, exchange) if self.version < step else None

    patch.setattr(Rounds, "own_report", forget)


@mutant("joins")
def a_record_outlives_its_generation(patch: Patch) -> None:
    """W2: the record of a commit that was undone came with the reply, and is void."""
    open_ = Worker.open

    def remember(self: Worker, plan: Plan) -> bool:
        incoming = self._incoming
        opened = open_(self, plan)
        self._incoming = incoming
        return opened

    patch.setattr(Worker, "open", remember)


@mutant("joins")
def a_commit_that_nobody_saw_is_kept(patch: Patch) -> None:
    """S2: a step that no slice anywhere has taken is formed again, with the workers of now."""
    plan_ = Rounds.plan

    def keep(self: Rounds, plan: Plan) -> None:
        owed, record = set(self._owed), self.record
        plan_(self, plan)
        if owed and not self._owed and not self.opened:
            self._owed, self.record = owed, record

    patch.setattr(Rounds, "plan", keep)


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


# --- promises ------------------------------------------------------------------------------------


@mutant("joins")
def a_worker_is_not_bound_by_its_answer(patch: Patch) -> None:
    """W2: from its answer on, a worker ignores replies of older generations."""
    freeze, open_ = Worker.freeze, Worker.open

    def answer_and_go_on(self: Worker, entry: Entry) -> Frozen | Stale:
        before = self.plan
        answer = freeze(self, entry)
        self.plan = before
        return answer

    def open_all_the_same(self: Worker, plan: Plan) -> bool:
        if plan.entry.generation == self.promised and plan != self.plan:
            self.plan = None
        return open_(self, plan)

    patch.setattr(Worker, "freeze", answer_and_go_on)
    patch.setattr(Worker, "open", open_all_the_same)


@mutant("joins")
def a_shard_is_not_bound_by_its_answer(patch: Patch) -> None:
    """S1: from its answer on, a shard accepts nothing of an older generation."""
    freeze, plan_ = Rounds.freeze, Rounds.plan

    def answer_and_go_on(self: Rounds, entry: Entry) -> Frozen | Stale:
        kept = ("entry", "promised", "opened", "_plan", "_held")
        before = {name: getattr(self, name) for name in kept}
        answer = freeze(self, entry)
        if before["opened"]:
            for name, value in before.items():
                setattr(self, name, value)
        return answer

    def plan_all_the_same(self: Rounds, plan: Plan) -> None:
        freeze(self, plan.entry)
        plan_(self, plan)

    patch.setattr(Rounds, "freeze", answer_and_go_on)
    patch.setattr(Rounds, "plan", plan_all_the_same)


# --- sums and gradients --------------------------------------------------------------------------


@mutant("workers")
def sums_survive_whatever_is_in_them(patch: Patch) -> None:
    """S4: only what is a prefix of the new list, in rank order, may be kept."""
    patch.setattr(Sums, "keep_prefix", lambda self, index, order: None)


@mutant("joins")
def sums_are_not_formed_in_rank_order(patch: Patch) -> None:
    """G2, S5: an early arrival waits."""
    admit = Rounds.admit

    def admit_at_once(
        self: Rounds, begin: Begin, index: int, start: int, count: int, *, ahead: int = 0
    ) -> Admission:
        admission = admit(self, begin, index, start, count)
        if not isinstance(admission, Wait):
            return admission
        nobody = all(self.sums.progress(worker, index) == 0 for worker in self.order)
        return Add(start, start + count, first=nobody)

    patch.setattr(Rounds, "admit", admit_at_once)


@mutant("network")
def a_repeated_stream_is_added_again(patch: Patch) -> None:
    """S5: what is in the sum is skipped, up to the element that it has come to."""
    added = Sums.added

    def remember_whole_ones(self: Sums, sender: str, index: int, stop: int) -> None:
        added(self, sender, index, stop)
        admitted = self.slices[index].element_count
        if stop < admitted and stop % 2:
            self._came[index][sender] = 0

    patch.setattr(Sums, "added", remember_whole_ones)


@mutant("network")
def a_second_gradient_has_the_same_name(patch: Patch) -> None:
    """W5: a push is one gradient for ever; a repeated one is the same, bit for bit."""
    repeat = Talks._stream

    def compute_again(self: Talks, talk: Talk) -> object:
        if talk.begun and talk.gradient is not None:
            talk.gradient = talk.gradient._replace(number=talk.gradient.number + 1)
        return repeat(self, talk)

    patch.setattr(Talks, "_stream", compute_again)


@mutant("shards")
def a_joiner_is_counted_in_a_decided_step(patch: Patch) -> None:
    """G4, S3: the workers of a step that somebody has decided are those of its record."""
    patch.setattr(Rounds, "_order", lambda self, index: self.order)


@mutant("joins")
def a_joiner_waits_for_the_step_after(patch: Patch) -> None:
    """G4, W4: all workers of a generation make its first new step, or nobody does."""
    owes = Worker.owes

    def wait(self: Worker, plan: Plan, indices: list[int], step: int) -> list[int]:
        took = plan.record is None or self.id in plan.record.workers
        return owes(self, plan, indices, step) if took or step > plan.base + 1 else []

    patch.setattr(Worker, "owes", wait)


@mutant("shards")
def nobody_pushes_for_a_decided_step(patch: Patch) -> None:
    """W4: a slice that nobody has at the base takes the base step again, from pushes."""
    owes = Worker.owes

    def owe_the_next(self: Worker, plan: Plan, indices: list[int], step: int) -> list[int]:
        return owes(self, plan, indices, step) if step > plan.base else []

    patch.setattr(Worker, "owes", owe_the_next)


# --- copies --------------------------------------------------------------------------------------


@mutant("network")
def a_copy_is_torn_by_a_broken_reply(patch: Patch) -> None:
    """W6: weights, state and version of a slice are replaced as one, when all has come."""
    take = Talks._take

    def take_at_once(
        self: Talks, reading: Reading, begin: Begin, run: Run, weights: Weights | None
    ) -> None:
        if run.count and not reading.coming.get(run.slice):
            self._worker.worker.arrived(run.slice, begin.step)
            self._worker.cluster.changed = True
        take(self, reading, begin, run, weights)

    patch.setattr(Talks, "_take", take_at_once)


@mutant("swaps")
def weights_are_uploaded_whoever_has_written_them(patch: Patch) -> None:
    """W3: the checksum is verified again, as user code may have changed the weights."""
    patch.setattr(Uploads, "intact", lambda self, index: True)
    patch.setattr(SimShard, "intact", lambda self, elements, checksum: True)


@mutant("swaps")
def a_copy_that_is_none_is_not_told(patch: Patch) -> None:
    """W3: a wrong checksum is said, or the plan waits for a copy that nobody has."""
    patch.setattr(Uploads, "say_what_is_missing", lambda self, plan: None)


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


@mutant("storm")
def a_lost_lineage_goes_on_from_anybodys_weights(patch: Patch) -> None:
    """C5: what is gone is said, and weights are never initialised again in silence."""
    restore = Membership.restore

    def begin_again(self: Membership, why: str) -> list[Instruction]:
        self.entry = replace(self.entry, opened=False)
        return restore(self, why)

    patch.setattr(Membership, "restore", begin_again)
