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
    Bye,
    FromMember,
    Frozen,
    Hello,
    Holding,
    Logged,
    Opened,
    Planned,
    Renewal,
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
from adashard_server.cluster.instructions import Announce, Instruction, StepDown, Tell
from adashard_server.cluster.jobs import JOBS_MAX, check_join, new_entry, new_spec, offer_of
from adashard_server.cluster.leases import Leases, LeaseSettings
from adashard_server.cluster.membership import Membership, Phase, Surroundings

SHARDS_MAX = 256
REPLACED = "replaced"


@dataclass(slots=True)
class Contact:
    """A member that has said hello: who it is, and what it last told of itself."""

    hello: Hello
    index: int
    attached: bool = True
    draining: bool = False
    holdings: dict[str, Holding] = field(default_factory=dict)

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
        now: float,
    ) -> None:
        self.id = coordinator_id
        self.min_shards = min_shards
        self.slice_bytes = slice_bytes
        self.settings = leases
        self.leases = Leases(leases)
        self.contacts: dict[str, Contact] = {}
        self.jobs: dict[str, Membership] = {}
        self._token = token
        self._promised: dict[str, int] = {}
        self._shard_count = 0
        for entry in entries:
            self._take_over(entry, now)

    def _take_over(self, entry: Entry, now: float) -> None:
        """A job that an earlier coordinator has left: all its members get a fresh lease (C1)."""
        membership = self.jobs[entry.job] = Membership(entry, self.id)
        membership.ask_for_change()
        for member in membership.members:
            self.leases.renew(member.id, now)

    # --- what comes in --------------------------------------------------------------------------

    def handle(self, member: str, message: FromMember, now: float) -> list[Instruction]:
        """A message of a member that has said hello.

        Raises:
            InvalidRequest: nobody of this id has said hello.
        """
        contact = self.contacts.get(member)
        if contact is None:
            raise InvalidRequest(f"{member} has not said hello")
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
                    return [StepDown(f"member {member} has promised generation {promised}")]
            case StepSummary(job=job, step=step) if job in self.jobs:
                self.jobs[job].versions[member] = step
            case Logged() | _:
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
        if hello.worker is not None:
            job_version, instructions = self._join(hello, hello.worker)
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
        return self.jobs[job].swapped(done, stored, now)

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed; to be called several times a second."""
        self.leases.tick(now)
        around = self._surroundings(now)
        instructions: list[Instruction] = []
        for membership in self.jobs.values():
            instructions += membership.tick(around, now)
        self._forget_the_dead(around)
        return instructions

    # --- inside ---------------------------------------------------------------------------------

    def _check(self, hello: Hello) -> None:
        if self._token and not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            raise Unauthenticated(f"{hello.host or 'a member'} has no valid token for this cluster")
        check_version(hello.version, whose="the worker" if hello.worker else "the shard")
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
            entry = new_entry(worker, self._promised.get(worker.job, 0), self.slice_bytes)
            membership = self.jobs[worker.job] = Membership(entry, self.id)
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
        if contact.hello.shard is not None:
            contact.holdings = {holding.job: holding for holding in renewal.holdings}
        instructions: list[Instruction] = []
        for standing in renewal.standings:
            membership = self.jobs.get(standing.job)
            if membership is not None:
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
            min_shards=self.min_shards,
        )

    def _forget_the_dead(self, around: Surroundings) -> None:
        """Forgets members that have died and are in no generation any more."""
        members = {
            member.id for one in self.jobs.values() for member in (*one.members, *one.pending())
        }
        for member in around.given_up - members:
            self.leases.forget(member)
            self.contacts.pop(member, None)


def refusal(hello: Hello, error: AdashardError) -> Bye:
    """What a member is told whose hello was refused."""
    job = hello.worker.job if hello.worker else ""
    return Bye(job=job, generation=2**31 - 1, error=error.info())
