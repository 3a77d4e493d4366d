"""One job's membership, decided: one procedure for start, join, leave and death. Pure.

    idle ──▶ swapping ──▶ freezing ──▶ planning ──▶ (marking) ──▶ open
               ▲                                                   │
               └──────────── anything that changes ◀───────────────┘

`swapping` waits for the registry to compare and set the next generation; `freezing` for the
answers of all members; `planning` until every slice is where it belongs; `marking` for the
registry to note that the lineage has been opened for the first time. This is the coordinator's
half of the protocol (docs/protocol.md, rules G and C); leases come in as "these are dead".
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from adashard.wire.control import (
    Bye,
    Freeze,
    Frozen,
    Notice,
    Open,
    Opened,
    Planned,
    PlanRequest,
    Standing,
)
from adashard.wire.errors import AdashardError, JobLost, LeaseExpired
from adashard.wire.messages import Entry, Lineage, Member, Plan
from adashard.wire.placement import cut
from adashard.wire.spec import JobSpec
from adashard_server.cluster.instructions import Announce, HangUp, Instruction, StepDown, Swap, Tell
from adashard_server.cluster.planner import place
from adashard_server.cluster.recovery import Lost, reconcile
from adashard_server.cluster.registry import ABSENT

REPEAT_S = 1.0  # after which an unanswered freeze, plan or open is sent again


class Phase(enum.Enum):
    """Where the procedure stands."""

    IDLE = "idle"
    SWAPPING = "swapping"
    FREEZING = "freezing"
    PLANNING = "planning"
    MARKING = "marking"
    OPEN = "open"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a job sees of the cluster at one moment.

    Attributes:
        shards: ids and addresses of the shards that take slices, in the order they joined.
        dead: members of any kind whose lease has ended.
        given_up: dead shards that are not waited for any longer.
        min_shards: shards that the first generation needs.
    """

    shards: Mapping[str, str]
    dead: frozenset[str] = frozenset()
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


@dataclass(slots=True)
class Membership:
    """The members of one job and their generation. Not thread-safe.

    Attributes:
        entry: what the registry holds, as far as known.
        author: the coordinator's id, new at every start.
    """

    entry: Entry
    author: str
    phase: Phase = Phase.IDLE
    joiners: list[str] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    _pending: Entry | None = None
    _writes: int = 0
    _wanted: bool = False  # a change without a new or dead member: a leave, or a restart
    _offers: dict[str, Start] = field(default_factory=dict)  # of workers that have loaded a state
    _leaving: set[str] = field(default_factory=set)
    _gone: set[str] = field(default_factory=set)
    _answers: dict[str, Frozen] = field(default_factory=dict)
    _ready: set[str] = field(default_factory=set)
    _opened: set[str] = field(default_factory=set)
    _plan: Plan | None = None
    _repeat_at: float = 0.0
    _said: str = ""

    # --- who comes and goes ---------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The newest version that a shard of the job has told of; -1 before any weights."""
        shards = {shard.id for shard in self.entry.shards}
        told = [version for member, version in self.versions.items() if member in shards]
        return max([*told, self._plan.base if self._plan else -1])

    @property
    def writing(self) -> bool:
        """Whether the registry has not yet answered."""
        return self.phase in (Phase.SWAPPING, Phase.MARKING)

    @property
    def members(self) -> tuple[Member, ...]:
        """Workers and shards of the newest generation, without leavers that have been let go."""
        staying = (worker for worker in self.entry.workers if worker.id not in self._gone)
        return (*staying, *self.entry.shards)

    def worker_ids(self) -> set[str]:
        """Workers of the generation and those that wait to join."""
        return {worker.id for worker in self.entry.workers} - self._gone | set(self.joiners)

    @property
    def start(self) -> Start | None:
        """What the job has begun with, or will; None while no worker waits to begin it."""
        lineage = self.entry.lineage
        if lineage is not None:
            return Start(lineage.base_version, lineage.fingerprint)
        waiting = self.worker_ids()
        offers = (offer for worker, offer in self._offers.items() if worker in waiting)
        return next(offers, FRESH if waiting else None)

    def join(self, worker: str, offer: Start = FRESH) -> None:
        """A worker wants to take part from the next generation on.

        Args:
            worker: its id.
            offer: what it would begin the job with.
        """
        if offer != FRESH:
            self._offers[worker] = offer
        if worker not in self.worker_ids():
            self.joiners.append(worker)

    def ask_for_change(self) -> None:
        """Has the next generation made although nobody came or went."""
        self._wanted = True

    def pending(self) -> tuple[Member, ...]:
        """Members of a generation that is being written."""
        return (*self._pending.workers, *self._pending.shards) if self._pending else ()

    def restart(self, spec: JobSpec) -> None:
        """Begins the job anew with `spec`: the next generation starts a lineage of its own.

        To be called when nobody works on it and no write is under way.
        """
        self.entry = replace(
            self.entry, spec=spec, workers=(), shards=(), placement=(), lineage=None, opened=False
        )
        self.phase, self._plan, self._wanted, self.reason = Phase.IDLE, None, True, ""
        self.joiners.clear()
        self.versions.clear()
        self._offers.clear()

    def renewed(self, member: str, standing: Standing, now: float) -> list[Instruction]:
        """A member says where it stands."""
        self.versions[member] = standing.version
        if standing.leaving and member in self.joiners:
            self.joiners.remove(member)
            return self._bye(member, None)
        if standing.leaving and member in self.worker_ids() and member not in self._leaving:
            self._leaving.add(member)
            self._wanted = True
        if not self.entry.author and self.phase is Phase.IDLE:
            # A job of this name was there before a coordinator that kept it in memory: go on above.
            highest = max(self.entry.generation, standing.generation)
            self.entry = replace(self.entry, generation=highest)
        if standing.generation > self.entry.generation and self.phase is not Phase.SWAPPING:
            return [StepDown(f"a member has promised generation {standing.generation}")]
        if (
            member not in self.worker_ids()
            and standing.generation > 0
            and not self._is_shard(member)
        ):
            error = LeaseExpired(f"worker {member} is no longer part of job {self.entry.job!r}")
            return self._bye(member, error)
        return []

    # --- the procedure --------------------------------------------------------------------------

    def tick(self, around: Surroundings, now: float) -> list[Instruction]:
        """Changes what has to change, releases leavers, repeats what is not answered."""
        if self.writing:
            return []
        self.joiners = [joiner for joiner in self.joiners if joiner not in around.dead]
        if self.phase is Phase.LOST:
            return []
        if self._must_change(around):
            blocked = self._blocked(around)
            if not blocked:
                return self._change(around)
            return self._say(blocked)
        instructions = self._release(around) if self.phase is Phase.OPEN else []
        if now >= self._repeat_at:
            self._repeat_at = now + REPEAT_S
            instructions += self._unanswered()
        return instructions

    def swapped(self, done: bool, stored: Entry | None, now: float) -> list[Instruction]:
        """The registry has answered, possibly after a lost answer: `stored` is what it holds."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        if not done and (stored is None or stored.author != pending.author):
            return [StepDown(f"job {pending.job!r} was written by another coordinator")]
        marking, self.entry = self.phase is Phase.MARKING, pending
        if marking:
            assert self._plan is not None
            self._plan = replace(self._plan, entry=pending)
            return self._go_open(now)
        placed = {worker.id for worker in pending.workers}
        self.joiners = [joiner for joiner in self.joiners if joiner not in placed]
        self.phase, self._repeat_at = Phase.FREEZING, now + REPEAT_S
        self._answers, self._ready = {}, set()
        members = f"{len(pending.workers)} workers, {len(pending.shards)} shards"
        text = f"generation {pending.generation}: {members}"
        return [
            Announce(pending.job, "generation", text, {"generation": str(pending.generation)}),
            *self._unanswered(),
        ]

    def frozen(self, member: str, answer: Frozen, now: float) -> list[Instruction]:
        """A member has promised the generation and said what it holds."""
        if self.phase is not Phase.FREEZING or answer.generation != self.entry.generation:
            return []
        if member in {one.id for one in self.members}:
            self._answers[member] = answer
        if any(one.id not in self._answers for one in self.members):
            return []
        return self._make_plan(now)

    def planned(self, member: str, answer: Planned, now: float) -> list[Instruction]:
        """Every slice of a shard is where the plan wants it."""
        if self.phase is not Phase.PLANNING or answer.generation != self.entry.generation:
            return []
        self._ready.add(member)
        owners = {self.entry.shards[owner].id for owner in self.entry.placement}
        if not owners <= self._ready:
            return []
        if self.entry.opened:
            return self._go_open(now)
        self.phase = Phase.MARKING
        return [self._write(replace(self.entry, opened=True))]

    def opened(self, member: str, answer: Opened) -> None:
        """A member goes on."""
        if self.phase is Phase.OPEN and answer.generation == self.entry.generation:
            self._opened.add(member)

    # --- inside ---------------------------------------------------------------------------------

    def _is_shard(self, member: str) -> bool:
        return any(shard.id == member for shard in self.entry.shards)

    def _must_change(self, around: Surroundings) -> bool:
        if any(member.id in around.dead for member in self.members):
            return True
        settled = self.phase in (Phase.IDLE, Phase.OPEN)
        return settled and bool(self.joiners or self._wanted)

    def _blocked(self, around: Surroundings) -> str:
        """Why no generation can be made yet; empty if one can."""
        lineage, spec = self.entry.lineage, self.entry.spec
        waiting = [shard.id for shard in self.entry.shards if shard.id in around.dead]
        if any(shard not in around.given_up for shard in waiting):
            return f"shard {waiting[0]} is silent: waiting for it"
        if not around.shards and not waiting:
            return "no shard is there"
        if lineage is not None:
            return ""
        if len(around.shards) < around.min_shards:
            return (
                f"the first step needs {around.min_shards} shards; {len(around.shards)} are there"
            )
        live = sum(not worker.leaving for worker in self._live_workers(around))
        if live < spec.min_workers:
            return f"the first step needs {spec.min_workers} workers; {live} are there"
        return ""

    def _live_workers(self, around: Surroundings) -> list[Member]:
        """Workers of the next generation, in rank order."""
        staying = [
            replace(worker, leaving=worker.id in self._leaving)
            for worker in self.entry.workers
            if worker.id not in around.dead and worker.id not in self._gone
        ]
        first = self.entry.next_rank
        new = [Member(id=joiner, rank=first + n) for n, joiner in enumerate(self.joiners)]
        return staying + new

    def _change(self, around: Surroundings) -> list[Instruction]:
        """The next generation, to be compared and set."""
        workers = self._live_workers(around)
        shards = self._next_shards(around)
        if not shards:
            return self._lose("all shards of the job are gone")
        entry = replace(
            self.entry,
            generation=self.entry.generation + 1,
            workers=tuple(workers),
            shards=tuple(shards),
            placement=self._placement(shards),
            next_rank=self.entry.next_rank + len(self.joiners),
        )
        if entry.lineage is None:
            entry = replace(entry, lineage=self._new_lineage(entry))
        self.phase, self._wanted, self._said = Phase.SWAPPING, False, ""
        return [self._write(entry)]

    def _new_lineage(self, entry: Entry) -> Lineage:
        """Begins with the lowest rank (C7), of those that have loaded a state if any has."""
        staying = [worker.id for worker in entry.workers if not worker.leaving]
        origin = next((worker for worker in staying if worker in self._offers), staying[0])
        offer = self._offers.get(origin, FRESH)
        return Lineage(
            number=entry.generation,
            origin=origin,
            base_version=offer.version,
            fingerprint=offer.fingerprint,
        )

    def _next_shards(self, around: Surroundings) -> list[Member]:
        """Shards of the next generation: those of the job that live, or all for a new job."""
        alive = [shard for shard in self.entry.shards if shard.id not in around.dead]
        if self.entry.lineage is not None and self.entry.shards:
            return alive
        return [Member(id=shard, address=address) for shard, address in around.shards.items()]

    def _placement(self, shards: list[Member]) -> tuple[int, ...]:
        ids = [shard.id for shard in shards]
        before = {
            index: self.entry.shards[owner].id for index, owner in enumerate(self.entry.placement)
        }
        return place(cut(self.entry.spec), ids, previous=before)

    def _write(self, entry: Entry) -> Swap:
        expected = (self.entry.generation, self.entry.author) if self.entry.author else ABSENT
        self._writes += 1
        self._pending = replace(entry, author=f"{self.author}/{self._writes}")
        return Swap(self._pending, expected)

    def _make_plan(self, now: float) -> list[Instruction]:
        plan = reconcile(self.entry, self._answers)
        if isinstance(plan, Lost):
            return self._lost_slice(plan)
        self._plan, self.phase, self._repeat_at = plan, Phase.PLANNING, now + REPEAT_S
        return self._unanswered()

    def _lost_slice(self, lost: Lost) -> list[Instruction]:
        """State is gone (C5): a lineage never opened is chosen anew, otherwise the job stops.

        The next worker that has its initial weights begins the job, be it there already or not.
        """
        if not self.entry.opened:
            self.entry = replace(self.entry, lineage=None)
            self.phase, self._wanted = Phase.IDLE, True
            return []
        piece = cut(self.entry.spec)[lost.slice_index]
        name = self.entry.spec.parameters[piece.parameter].name
        return self._lose(
            f"nobody holds slice {lost.slice_index} ({name!r}) at step {lost.version} any more"
        )

    def _lose(self, why: str) -> list[Instruction]:
        """The job stops, and says so to everybody."""
        self.phase, self.reason = Phase.LOST, why
        error = JobLost(f"job {self.entry.job!r} is lost: {why}", job=self.entry.job)
        instructions: list[Instruction] = [Announce(self.entry.job, "lost", why)]
        for worker in sorted(self.worker_ids()):
            instructions += self._bye(worker, error)
        self.joiners.clear()
        return instructions

    def _go_open(self, now: float) -> list[Instruction]:
        self.phase, self._opened, self._repeat_at = Phase.OPEN, set(), now + REPEAT_S
        assert self._plan is not None
        text = f"generation {self.entry.generation} is open at step {self._plan.base}"
        return [Announce(self.entry.job, "open", text), *self._unanswered()]

    def _unanswered(self) -> list[Instruction]:
        """What the phase asks of members, to those that have not answered it."""
        match self.phase:
            case Phase.FREEZING:
                waiting = [one.id for one in self.members if one.id not in self._answers]
                return [Tell(member, Freeze(entry=self.entry)) for member in waiting]
            case Phase.PLANNING if self._plan is not None:
                plan = PlanRequest(plan=self._plan)
                return [Tell(one.id, plan) for one in self.members if one.id not in self._ready]
            case Phase.OPEN if self._plan is not None:
                opening = Open(plan=self._plan)
                return [Tell(one.id, opening) for one in self.members if one.id not in self._opened]
            case _:
                return []

    def _release(self, around: Surroundings) -> list[Instruction]:
        """Lets leavers go once the others have at least the leaver's version (C8)."""
        leavers = [worker for worker in self.entry.workers if worker.leaving]
        if not leavers or any(member.id in around.dead for member in self.members):
            return []
        others = [worker for worker in self.entry.workers if not worker.leaving]
        instructions: list[Instruction] = []
        for leaver in leavers:
            behind = self.versions.get(leaver.id, -1)
            if leaver.id in self._gone or any(
                self.versions.get(other.id, -1) < behind for other in others
            ):
                continue
            self._gone.add(leaver.id)
            instructions += self._bye(leaver.id, None)
            instructions.append(
                Announce(self.entry.job, "left", f"worker {leaver.id} (rank {leaver.rank}) left")
            )
        return instructions

    def _bye(self, member: str, error: AdashardError | None) -> list[Instruction]:
        bye = Bye(
            job=self.entry.job,
            generation=self.entry.generation,
            error=error.info() if error else None,
        )
        return [Tell(member, bye), HangUp(member)]

    def _say(self, blocked: str) -> list[Instruction]:
        """Tells waiting workers once why they wait."""
        if blocked == self._said:
            return []
        self._said = self.reason = blocked
        notice = Notice(job=self.entry.job, text=blocked)
        told: list[Instruction] = [Tell(worker, notice) for worker in sorted(self.worker_ids())]
        return [Announce(self.entry.job, "waiting", blocked), *told]
