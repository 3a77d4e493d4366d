"""The coordinator: contacts, leases and jobs of one cluster. Pure.

Messages and a clock come in, instructions go out:
`rpc/coordinator_service.py` feeds it from control streams and carries out what it says; REST and
metrics read its `ClusterView`. Everything is called in one thread.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field

from adashard.wire.control import (
    CHECKPOINT_UNREADABLE,
    Bye,
    FromMember,
    Frozen,
    Happened,
    Hello,
    Holding,
    Logged,
    Notice,
    Opened,
    Planned,
    Renewal,
    Snapshotted,
    Stale,
    Standing,
    StepSummary,
    Welcome,
    WorkerHello,
)
from adashard.wire.errors import (
    AdashardError,
    InvalidRequest,
    LeaseExpired,
    Overloaded,
    Unauthenticated,
)
from adashard.wire.messages import Entry
from adashard.wire.placement import DEFAULT_SLICE_BYTES, first_difference
from adashard.wire.version import VERSION, check_version
from adashard_server.cluster import links
from adashard_server.cluster.checkpoints import Checkpoints
from adashard_server.cluster.cutting import Cuttings
from adashard_server.cluster.instructions import (
    Announce,
    HangUp,
    Instruction,
    StepDown,
    Tell,
)
from adashard_server.cluster.jobs import (
    JOBS_MAX,
    SHARDS_MAX,
    begin_job,
    check_join,
    new_spec,
    offer_of,
)
from adashard_server.cluster.leases import Leases, LeaseSettings
from adashard_server.cluster.membership import Membership, Phase
from adashard_server.cluster.strikes import STRIKES, Strikes
from adashard_server.cluster.succession import Surroundings
from adashard_server.cluster.takeover import Takeovers

LINKS_MAX = 1000  # of one member; what it reports beyond that is not looked at
REPLACED = "replaced"
FOREVER = 2**31 - 1
"""Above every generation: a member is told to go whatever it has promised."""


@dataclass(slots=True)
class Contact:
    """A member that has said hello: who it is, and what it last told of itself."""

    hello: Hello
    index: int
    attached: bool = True
    draining: bool = False
    holdings: dict[str, Holding] = field(default_factory=dict)
    broken_links: frozenset[str] = frozenset()
    evicted: AdashardError | None = None

    @property
    def job(self) -> str | None:
        """The job of a worker; None for a shard."""
        return self.hello.worker.job if self.hello.worker else None


class Coordinator:
    """Decides who is a member of what. Not thread-safe.

    Args:
        coordinator_id: new at every start.
        entries: what the registry holds.
        leases: times of membership.
        min_shards: shards that a job's first generation needs.
        slice_bytes: of jobs whose workers leave it open.
        token: the cluster's secret; empty for none.
        alone: whether the registry is this process's memory, so that no other coordinator writes.
        strikes: steps in a row with gradients that are not finite, after which a worker is evicted;
            0 for never.
        checkpoints: those in the cluster's directory; None for a cluster without one.
    """

    def __init__(
        self,
        coordinator_id: str,
        entries: Iterable[Entry],
        *,
        leases: LeaseSettings,
        min_shards: int,
        token: str,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        alone: bool = False,
        strikes: int = STRIKES,
        checkpoints: Checkpoints | None = None,
        now: float,
    ) -> None:
        self.id = coordinator_id
        self.min_shards = min_shards
        self.slice_bytes = slice_bytes
        self.settings = leases
        self.leases = Leases(leases)
        self.contacts: dict[str, Contact] = {}
        self.jobs: dict[str, Membership] = {}
        self.checkpoints = checkpoints or Checkpoints()
        self.cuttings = Cuttings(self.checkpoints, coordinator_id)
        self.registry_error = ""  # while the registry does not answer
        self._takeovers = Takeovers(self.jobs, self.leases, self._membership, leases.grace_s)
        self._alone = alone
        self._strikes = Strikes(strikes)
        self._token = token
        self._promised: dict[str, int] = {}
        self._shard_count = 0
        for entry in entries:
            self._take_over(entry, now)

    def _take_over(self, entry: Entry, now: float) -> None:
        """A job that an earlier coordinator has left: all its members get a fresh lease (C1)."""
        membership = self.jobs[entry.job] = self._membership(entry)
        membership.ask_for_change()
        for member in membership.members:
            self.leases.expect(member.id, now)

    def _membership(self, entry: Entry) -> Membership:
        return Membership(entry, self.id, self.checkpoints)

    # --- what comes in --------------------------------------------------------------------------

    def handle(self, member: str, message: FromMember, now: float) -> list[Instruction]:
        """A message of a member that has said hello.

        Raises:
            LeaseExpired: nobody of this id has said hello, or it was silent for too long since.
        """
        contact = self.contacts.get(member)
        if contact is None:
            raise LeaseExpired(f"{member} was silent for so long that it has been forgotten")
        self.leases.renew(member, now)
        match message:
            case Renewal():
                return self._renewed(member, contact, message, now)
            case Frozen(job=job) if job in self.jobs:
                return self.jobs[job].frozen(member, message, now)
            case Planned(job=job) if job in self.jobs:
                return self.jobs[job].planned(member, message, now)
            case Opened(job=job) if job in self.jobs:
                self.jobs[job].opened(member, message)
            case Stale(job=job, promised=promised) if job in self.jobs:
                if promised > self.jobs[job].entry.generation:
                    return self._overtaken(member, self.jobs[job], promised)
            case StepSummary(job=job, step=step) if job in self.jobs:
                self.jobs[job].versions[member] = step
                if contact.job is None:
                    return self._strike(message, now)
            case Logged(job=job) if job in self.jobs:
                self.cuttings.logged(member, message)
            case Snapshotted(job=job) if job in self.jobs:
                return self.cuttings.snapshotted(member, message)
            case Happened(job=job) if job in self.jobs:
                return self._happened(message)
            case _:
                pass
        return []

    def hello(self, hello: Hello, now: float) -> list[Instruction]:
        """A member's first message on a new stream, whether it is new or has come back.

        Raises:
            AdashardError: it is refused; the stream is to be ended with that.
        """
        self._check(hello)
        known = self.contacts.get(hello.id)
        job_version, instructions = -1, list[Instruction]()
        for entry in hello.entries:
            instructions += self._takeovers.offered(entry, hello.id, now)
        if hello.worker is not None:
            job_version, joining = self._join(hello, hello.worker)
            instructions += joining
            if self.registry_error:
                instructions.append(self._registry_notice(hello.id, hello.worker.job))
        if known is None:
            index = self._next_index() if hello.shard else -1
            self.contacts[hello.id] = Contact(hello, index)
        else:
            known.attached = True
        self.leases.renew(hello.id, now)
        welcome = Welcome(
            version=VERSION,
            lease_s=self.settings.lease_s,
            renew_s=self.settings.renew_s,
            job_version=job_version,
            checkpoint_dir=self.checkpoints.directory if hello.shard else "",
            checkpoint_mark=self.checkpoints.mark if hello.shard else "",
        )
        return [Tell(hello.id, welcome), *instructions]

    def detached(self, member: str, now: float) -> list[Instruction]:
        """A member's control stream has ended."""
        contact = self.contacts.get(member)
        if contact is None:
            return []
        contact.attached = False
        self.leases.broken(member, now)
        return []

    def swapped(self, job: str, done: bool, stored: Entry | None, now: float) -> list[Instruction]:
        """The registry has answered the last `Swap` of a job."""
        membership = self.jobs[job]
        instructions = membership.swapped(done, stored, now)
        for member in membership.members:
            if member.id not in self.leases:  # without an end it would be waited for for ever
                self.leases.expect(member.id, now)
        return instructions

    def looked_up(self, job: str, stored: Entry | None) -> list[Instruction]:
        """What the registry holds of a job, asked for now and then; not by one that is alone.

        A coordinator whose members all stay with it has no other way to learn that it was replaced.
        """
        membership = self.jobs.get(job)
        return membership.looked_up(stored) if membership and not self._alone else []

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed; to be called several times a second."""
        self.leases.tick(now)
        around = self._surroundings(now)
        instructions: list[Instruction] = []
        accounted = self.contacts.keys() | around.dead
        for membership in self.jobs.values():
            if self._takeovers.is_over(membership, accounted, now):
                instructions += membership.tick(around, now)
            opened, version = membership.phase is Phase.OPEN, membership.version
            instructions += self.cuttings.tick(
                membership.entry, opened=opened, version=version, now=now
            )
        self._forget_the_dead(around)
        return instructions + self._evict_unreachable(around, now)

    def evict(self, member: str, error: AdashardError, now: float) -> list[Instruction]:
        """Has a member that lives count as dead from now on, and tells it why. Idempotent.

        Args:
            member: its id.
            error: what its session or process ends with.
            now: seconds.
        """
        contact = self.contacts.get(member)
        if contact is None or contact.evicted is not None:
            return []
        contact.evicted = error
        self.leases.revoke(member, now)
        job, kind = contact.job or "", "shard" if contact.job is None else "worker"
        text = f"{kind} {member} is evicted: {error.message}"
        bye = Bye(job=job, generation=FOREVER, error=error.info())
        return [Announce(job, "evicted", text, {kind: member}), Tell(member, bye), HangUp(member)]

    def registry_gone(self, error: AdashardError) -> list[Instruction]:
        """The registry does not answer: steps go on, and every change waits until it does."""
        self.registry_error = error.message
        text = f"joins, leaves and deaths wait, steps go on: {error.message}"
        waiting = {
            worker: job
            for job, membership in self.jobs.items()
            if membership.writing
            for worker in membership.worker_ids()
        }
        notices = [self._registry_notice(worker, waiting[worker]) for worker in sorted(waiting)]
        return [Announce("", "registry_gone", text), *notices]

    def registry_back(self) -> list[Instruction]:
        """The registry answers again."""
        self.registry_error = ""
        return [Announce("", "registry_back", "the registry answers again")]

    # --- checkpoints ----------------------------------------------------------------------------

    def _happened(self, happened: Happened) -> list[Instruction]:
        """A member tells people something; that a checkpoint is damaged is for us as well (C5)."""
        job, name = happened.job, happened.facts.get("checkpoint", "")
        told = Announce(job, happened.name, happened.text, happened.facts)
        membership = self.jobs[job]
        lineage = membership.entry.lineage
        needed = membership.phase is Phase.PLANNING and lineage and lineage.checkpoint == name
        if happened.name != CHECKPOINT_UNREADABLE:
            return [told]
        self.checkpoints.unreadable(job, name)
        return [told, *membership.restore(happened.text)] if needed else []

    def _overtaken(self, member: str, membership: Membership, promised: int) -> list[Instruction]:
        """A member has promised more than we know: a newer coordinator's, or an older one's."""
        if not self._alone:
            return [StepDown(f"member {member} has promised generation {promised}")]
        job = membership.entry.job
        error = LeaseExpired(f"{member} comes too late to be taken over into job {job!r}")
        told = Tell(member, Bye(job=job, generation=promised, error=error.info()))
        return [told] if self._is_shard(member) else [told, HangUp(member)]

    # --- inside ---------------------------------------------------------------------------------

    def _check(self, hello: Hello) -> None:
        if self._token and not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            raise Unauthenticated(f"{hello.host or 'a member'} has no valid token for this cluster")
        check_version(hello.version, whose="the worker" if hello.worker else "the shard")
        known = self.contacts.get(hello.id)
        if known is not None and known.evicted is not None:
            raise known.evicted
        if (hello.worker is None) == (hello.shard is None) or not 8 <= len(hello.id) <= 64:
            raise InvalidRequest("a hello has an id and is that of a worker or of a shard")
        if hello.shard and hello.id not in self.contacts:
            shards = sum(contact.job is None for contact in self.contacts.values())
            if shards >= SHARDS_MAX:
                raise Overloaded(f"the cluster has {shards} shards, the most that are allowed")

    def _next_index(self) -> int:
        self._shard_count += 1
        return self._shard_count - 1

    def _join(self, hello: Hello, worker: WorkerHello) -> tuple[int, list[Instruction]]:
        """Lets a worker into its job; where the job stands, or -1 for a new one."""
        instructions: list[Instruction] = []
        membership = self.jobs.get(worker.job)
        if membership is not None and hello.id in membership.worker_ids():
            membership.join(hello.id, offer_of(worker))  # a coordinator that began anew lacks it
            return membership.version, instructions
        if worker.generation > 0:
            raise LeaseExpired(f"worker {hello.id} is no longer part of job {worker.job!r}")
        if membership is None:
            if len(self.jobs) >= JOBS_MAX:
                raise Overloaded(f"the cluster has {JOBS_MAX} jobs, the most that are allowed")
            entry, stored = begin_job(
                worker, self.checkpoints, self._promised.get(worker.job, 0), self.slice_bytes
            )
            membership = Membership(entry, self.id, self.checkpoints, stored)
            self.jobs[worker.job] = membership
        elif check_join(membership, worker):
            membership.restart(new_spec(worker, self.slice_bytes))
            text = f"job {worker.job!r} begins anew, as worker {hello.id} asked"
            instructions.append(Announce(worker.job, REPLACED, text))
        membership.join(hello.id, offer_of(worker))
        return membership.version, instructions

    def _renewed(
        self, member: str, contact: Contact, renewal: Renewal, now: float
    ) -> list[Instruction]:
        contact.draining = renewal.draining
        contact.broken_links = frozenset(renewal.broken_links[:LINKS_MAX])
        if contact.hello.shard is not None:
            contact.holdings = {holding.job: holding for holding in renewal.holdings}
        instructions: list[Instruction] = []
        for standing in renewal.standings:
            membership = self.jobs.get(standing.job)
            if membership is not None and self._is_foreign(standing, membership):
                instructions += self._overtaken(member, membership, standing.generation)
            elif membership is not None:
                self._revive(member, contact, standing, membership)
                instructions += membership.renewed(member, standing, now)
            elif contact.hello.shard is not None:
                promised = max(self._promised.get(standing.job, 0), standing.generation)
                self._promised[standing.job] = promised
        return instructions

    def _revive(
        self, member: str, contact: Contact, standing: Standing, membership: Membership
    ) -> None:
        """A worker that was taken for dead before its first generation waits for one again (C2)."""
        worker = contact.hello.worker
        if worker is None or standing.generation > 0 or standing.leaving:
            return
        same_model = first_difference(worker.spec, membership.entry.spec) is None
        if same_model and membership.phase is not Phase.LOST:
            membership.join(member, offer_of(worker))

    def _is_foreign(self, standing: Standing, membership: Membership) -> bool:
        """Whether a member stands in a generation that is none of ours, though nobody else writes.

        Before the first write of a job, what its members have promised is gone above.
        """
        written = membership.written and not membership.writing
        return bool(self._alone and written and standing.generation > membership.entry.generation)

    def _is_shard(self, member: str) -> bool:
        return self.contacts[member].job is None

    def _strike(self, summary: StepSummary, now: float) -> list[Instruction]:
        """Tells of gradients that are not finite, and evicts whose are so again and again."""
        lineage = self.jobs[summary.job].entry.lineage
        verdict = self._strikes.take(summary, lineage.number if lineage else 0)
        instructions: list[Instruction] = [*verdict.told]
        for worker, error in verdict.out.items():
            if worker in self.contacts and self.contacts[worker].job == summary.job:
                instructions += self.evict(worker, error, now)
        return instructions

    def _evict_unreachable(self, around: Surroundings, now: float) -> list[Instruction]:
        """Has one member go where two that live cannot reach each other (C9)."""
        living = {
            member: contact.job is not None
            for member, contact in self.contacts.items()
            if member not in around.dead
        }
        reports = {member: self.contacts[member].broken_links for member in living}
        chosen = links.to_evict(reports, living)
        if chosen is None:
            return []
        member, count = chosen
        error = links.reason(member, count, self.settings.lease_s)
        return self.evict(member, error, now)

    def _registry_notice(self, worker: str, job: str) -> Tell:
        text = f"changes of membership wait until the registry is back: {self.registry_error}"
        return Tell(worker, Notice(job=job, text=text))

    def _surroundings(self, now: float) -> Surroundings:
        dead = self.leases.dead(now)
        wait_s = self.settings.replace_after_s
        return Surroundings(
            shards={
                member: contact.hello.shard.address
                for member, contact in self.contacts.items()
                if contact.hello.shard and not contact.draining and member not in dead
            },
            dead=dead,
            given_up=frozenset(
                member for member in dead if self.leases.dead_since_s(member, now) >= wait_s
            ),
            silent=frozenset(
                member
                for member in dead
                if (contact := self.contacts.get(member)) is not None
                and contact.attached
                and contact.evicted is None
            ),
            min_shards=self.min_shards,
        )

    def _forget_the_dead(self, around: Surroundings) -> None:
        """Forgets members that have died, are in no generation any more, and wait for none."""
        jobs = self.jobs.values()
        members = {member.id for one in jobs for member in (*one.members, *one.pending())}
        members.update(joiner for one in jobs for joiner in one.joiners)
        for member in around.given_up - members:
            self.leases.forget(member)
            self.contacts.pop(member, None)


def refusal(hello: Hello, error: AdashardError) -> Bye:
    """What a member is told whose hello was refused."""
    job = hello.worker.job if hello.worker else ""
    return Bye(job=job, generation=FOREVER, error=error.info())
