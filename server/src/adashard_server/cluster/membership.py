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
from collections.abc import Iterable
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
from adashard.wire.spec import JobSpec, Recovery
from adashard_server.cluster.instructions import Announce, HangUp, Instruction, StepDown, Swap, Tell
from adashard_server.cluster.recovery import CHECKPOINT, Archive, Lost, Stored, rebuilt, reconcile
from adashard_server.cluster.succession import (
    FRESH,
    Start,
    Surroundings,
    deaths,
    next_placement,
    next_shards,
    next_workers,
    waits_for_beginners,
    waits_for_holder,
    waits_for_shards,
)
from adashard_server.cluster.writes import Writes

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


@dataclass(slots=True)
class Membership:
    """The members of one job and their generation. Not thread-safe.

    Attributes:
        entry: what the registry holds, as far as known.
        author: the coordinator's id, new at every start.
        archive: the checkpoints that there are; None where none are kept.
        stored: the checkpoint that the next lineage begins from; None for a worker's weights.
    """

    entry: Entry
    author: str
    archive: Archive | None = None
    stored: Stored | None = None
    phase: Phase = Phase.IDLE
    joiners: list[str] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    _writes: Writes = field(init=False)
    _wanted: bool = False  # a change without a new or dead member: a leave, or a restart
    _filled: set[str] = field(default_factory=set)  # shards that have had all their slices
    _void: bool = False  # the plan counts on a copy that its holder has found to be changed
    _offers: dict[str, Start] = field(default_factory=dict)  # of workers that have loaded a state
    _leaving: set[str] = field(default_factory=set)
    _gone: set[str] = field(default_factory=set)
    _answers: dict[str, Frozen] = field(default_factory=dict)
    _ready: set[str] = field(default_factory=set)
    _opened: set[str] = field(default_factory=set)
    _plan: Plan | None = None
    _repeat_at: float = 0.0
    _said: str = ""

    def __post_init__(self) -> None:
        self._writes = Writes(self.author, self.entry)

    # --- who comes and goes ---------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The newest version that a shard of the job has told of; -1 before any weights."""
        shards = {shard.id for shard in self.entry.shards}
        told = [version for member, version in self.versions.items() if member in shards]
        return max([*told, self._plan.base if self._plan else -1])

    @property
    def written(self) -> bool:
        """Whether its coordinator has written anything of it, or is about to."""
        return self._writes.begun

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

    def adopt(self, entry: Entry) -> None:
        """Goes on from an entry that a member has kept, and that is newer than what was read.

        To be called before anything is written; the first write expects what was read. Workers
        that have joined what was taken for a new job have to join again.
        """
        self.entry = replace(entry, author="")
        self.joiners.clear()
        self._offers.clear()
        self._wanted = True

    def ask_for_change(self) -> None:
        """Has the next generation made although nobody came or went."""
        self._wanted = True

    def pending(self) -> tuple[Member, ...]:
        """Members of a generation that is being written."""
        pending = self._writes.pending
        return (*pending.workers, *pending.shards) if pending else ()

    def restart(self, spec: JobSpec) -> None:
        """Begins the job anew with `spec`: the next generation starts a lineage of its own.

        To be called when nobody works on it and no write is under way.
        """
        self.entry = replace(
            self.entry, spec=spec, workers=(), shards=(), placement=(), lineage=None, opened=False
        )
        self.phase, self._plan, self._wanted, self.reason = Phase.IDLE, None, True, ""
        self.stored = None
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
        pending = self._writes.answered(done, stored)
        if pending is None:
            return [StepDown(f"job {self.entry.job!r} was written by another coordinator")]
        if isinstance(pending, Swap):
            text = f"the registry has lost generation {self.entry.generation}: it is written again"
            return [Announce(self.entry.job, "registry_lost", text), pending]
        marking, self.entry = self.phase is Phase.MARKING, pending
        if marking:
            assert self._plan is not None
            self._plan = replace(self._plan, entry=pending)
            return [self._says_recovery(), *self._go_open(now)]
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

    def looked_up(self, stored: Entry | None) -> list[Instruction]:
        """What the registry holds while nothing is being written: ours, unless we were replaced."""
        known = self.entry
        if self.writing or stored is None or stored.generation < known.generation:
            return []
        if (stored.generation, stored.author) != (known.generation, known.author):
            return [StepDown(f"job {known.job!r} was written by another coordinator")]
        return []

    def frozen(self, member: str, answer: Frozen, now: float) -> list[Instruction]:
        """A member has promised the generation and said what it holds."""
        if answer.generation != self.entry.generation:
            return []
        if self.phase is Phase.PLANNING:
            self._void |= set(answer.slices) < set(self._answers[member].slices)
        if self.phase is not Phase.FREEZING:
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
        if self.entry.opened and self._plan is not None:
            return [*rebuilt(self._plan), *self._go_open(now)]
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
        if self._void or any(member.id in around.dead for member in self.members):
            return True
        settled = self.phase in (Phase.IDLE, Phase.OPEN)
        return settled and bool(self.joiners or self._wanted)

    def _blocked(self, around: Surroundings) -> str:
        """Why no generation can be made yet; empty if one can."""
        waits = waits_for_shards(self.entry, around)
        workers = self._next_workers(around)
        waits = waits or waits_for_beginners(self.entry, around, workers)
        if not waits and self.entry.lineage is None and not self._origins(workers):
            waits = "no worker has its initial weights any more: waiting for one to join"
        rebuilt = any(
            shard.id in around.dead or shard.id not in self._filled for shard in self.entry.shards
        )
        if not waits and rebuilt and self.entry.opened:
            waits = waits_for_holder(self.entry, around, self.versions)
        return waits

    def _next_workers(self, around: Surroundings) -> list[Member]:
        return next_workers(
            self.entry,
            around,
            joiners=self.joiners,
            leaving=self._leaving,
            gone=self._gone,
        )

    def _change(self, around: Surroundings) -> list[Instruction]:
        """The next generation, to be compared and set."""
        followed = next_shards(self.entry, around)
        entry = replace(
            self.entry,
            generation=self.entry.generation + 1,
            workers=tuple(self._next_workers(around)),
            shards=tuple(shard for _, shard in followed),
            placement=next_placement(self.entry, followed),
            next_rank=self.entry.next_rank + len(self.joiners),
        )
        if entry.lineage is None:
            entry = replace(entry, lineage=self._new_lineage(entry), opened=False)
        self.phase, self._wanted, self._void, self._said = Phase.SWAPPING, False, False, ""
        return [*deaths(self.entry, around, self._gone), self._write(entry)]

    def _new_lineage(self, entry: Entry) -> Lineage:
        """Begins with a checkpoint if there is one to begin with, else with a worker's weights.

        This is the worker of lowest rank (C7), of those that have loaded a state if any has.
        """
        if self.stored is not None:
            return Lineage(
                number=entry.generation,
                origin="",
                base_version=self.stored.version,
                checkpoint=self.stored.name,
            )
        origin = self._origins(entry.workers)[0]
        offer = self._offers.get(origin, FRESH)
        return Lineage(
            number=entry.generation,
            origin=origin,
            base_version=offer.version,
            fingerprint=offer.fingerprint,
        )

    def _origins(self, workers: Iterable[Member]) -> list[str]:
        """Who can supply a lineage's first version: the best first; a checkpoint needs nobody.

        Whoever has said at a freeze that its weights are no longer its initial ones cannot.
        """
        if self.stored is not None:
            return [CHECKPOINT]
        fresh = [
            worker.id
            for worker in workers
            if not worker.leaving
            and ((answer := self._answers.get(worker.id)) is None or answer.fresh)
        ]
        return sorted(fresh, key=lambda worker: worker not in self._offers)

    def _write(self, entry: Entry) -> Swap:
        return self._writes.begin(entry)

    def _make_plan(self, now: float) -> list[Instruction]:
        lineage = self.entry.lineage
        if lineage and lineage.checkpoint and self.stored is None and self.archive:
            self.stored = self.archive.named(self.entry.job, lineage.checkpoint)
        plan = reconcile(self.entry, self._answers, self.stored.record if self.stored else None)
        if isinstance(plan, Lost):
            return self.restore(plan.why(self.entry))
        self._plan, self.phase, self._repeat_at = plan, Phase.PLANNING, now + REPEAT_S
        return self._unanswered()

    def restore(self, why: str) -> list[Instruction]:
        """State is gone (C5): the newest checkpoint begins a lineage, or the job stops.

        A lineage that was never opened is only chosen anew: the next worker that has its initial
        weights begins the job, be it there already or not.

        Args:
            why: what is gone.
        """
        job, lineage = self.entry.job, self.entry.lineage
        found = self.archive.newest(job, lineage) if self.archive and lineage else None
        begun = self.entry.opened or bool(lineage and lineage.checkpoint)
        if begun and found is None:
            return self._lose(why)
        self.entry, self.stored = replace(self.entry, lineage=None), found
        self.phase, self._wanted = Phase.IDLE, True
        if found is None:
            return []
        text = f"{why}: going on from checkpoint {found.name}, at step {found.version}"
        return [Announce(job, "restored", text, {"checkpoint": found.name})]

    def _lose(self, why: str) -> list[Instruction]:
        """The job stops, and says so to everybody."""
        self.phase, self.reason = Phase.LOST, why
        error = JobLost(f"job {self.entry.job!r} is lost: {why}", job=self.entry.job)
        instructions: list[Instruction] = [Announce(self.entry.job, "lost", why)]
        for worker in sorted(self.worker_ids()):
            instructions += self._bye(worker, error)
        self.joiners.clear()
        return instructions

    def _says_recovery(self) -> Announce:
        spec = self.entry.spec
        source = "workers" if spec.recovery is Recovery.WORKERS else "checkpoint"
        whence = "any worker's memory" if source == "workers" else "the newest checkpoint"
        text = f"a shard that dies is rebuilt from {whence}"
        return Announce(self.entry.job, "recovery", text, {"recovery": source})

    def _go_open(self, now: float) -> list[Instruction]:
        self.phase, self._opened, self._repeat_at = Phase.OPEN, set(), now + REPEAT_S
        self._filled = {shard.id for shard in self.entry.shards}
        self.stored = None
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
