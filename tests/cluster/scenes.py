"""A job's membership with all that it talks to: members that answer, a registry, a clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from adashard.wire.control import Frozen, FullSums, Opened, Planned, Standing
from adashard.wire.messages import Entry, Record
from adashard.wire.spec import AdafactorLayout, Group, JobSpec, Parameter
from adashard_server.cluster.instructions import Announce, Instruction, Swap, Tell
from adashard_server.cluster.membership import Membership, Phase
from adashard_server.cluster.succession import Surroundings

SPEC = JobSpec(
    parameters=tuple(Parameter(name=f"parameter-{n}", shape=(4,)) for n in range(3)),
    groups=(Group(adafactor=AdafactorLayout()),),
    slice_bytes=4096,
    min_workers=1,
)
SHARDS = ("shard-0", "shard-1")
T = TypeVar("T")


def told(instructions: Iterable[Instruction], kind: type[T]) -> dict[str, T]:
    """What was told to whom, of one kind."""
    return {
        one.member: one.message
        for one in instructions
        if isinstance(one, Tell) and isinstance(one.message, kind)
    }


def announced(instructions: Iterable[Instruction]) -> list[str]:
    """The names of events."""
    return [one.name for one in instructions if isinstance(one, Announce)]


@dataclass
class Scene:
    """Drives one `Membership`; what it said last is returned by every call."""

    membership: Membership
    shards: tuple[str, ...] = SHARDS
    dead: frozenset[str] = frozenset()
    quiet: frozenset[str] = frozenset()
    given_up: frozenset[str] = frozenset()
    min_shards: int = 1
    now: float = 0.0
    base: int = 0
    record: Record | None = None
    silent: set[str] = field(default_factory=set)
    holds: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._hold()

    @classmethod
    def begin(cls, *workers: str, min_workers: int = 1, **settings: object) -> Scene:
        """A new job that workers wait to join."""
        spec = replace(SPEC, min_workers=min_workers)
        membership = Membership(Entry(job="job", generation=0, author="", spec=spec), "c")
        for worker in workers:
            membership.join(worker)
        return cls(membership, **settings)  # type: ignore[arg-type]

    @classmethod
    def opened(cls, *workers: str, **settings: object) -> Scene:
        """A job whose first generation is open."""
        scene = cls.begin(*workers, **settings)
        scene.make_generation()
        return scene

    @property
    def entry(self) -> Entry:
        return self.membership.entry

    @property
    def phase(self) -> Phase:
        return self.membership.phase

    def workers(self) -> dict[str, int]:
        """Ranks of the workers of the generation."""
        return {worker.id: worker.rank for worker in self.entry.workers}

    # --- steps of the procedure -----------------------------------------------------------------

    def tick(self, after_s: float = 0.1) -> list[Instruction]:
        self.now += after_s
        around = Surroundings(
            shards={s: f"{s}:5000" for s in self.shards if s not in self.dead},
            dead=self.dead,
            silent=self.quiet,
            given_up=self.given_up,
            min_shards=self.min_shards,
        )
        return self.membership.tick(around, self.now)

    def swap(self) -> Swap:
        """The write that a tick asks for."""
        swap = self.tick()[-1]
        assert isinstance(swap, Swap)
        return swap

    def written(self, done: bool = True, stored: Entry | None = None) -> list[Instruction]:
        return self.membership.swapped(done, stored, self.now)

    def freeze(self, *members: str, **changes: object) -> list[Instruction]:
        """The answers of all members, or of some; what the last one leads to."""
        said: list[Instruction] = []
        for member in members or [one.id for one in self.membership.members]:
            if member not in self.silent:
                answer = replace(self.answer(member), **changes)  # type: ignore[arg-type]
                said = self.membership.frozen(member, answer, self.now)
        return said

    def answer(self, member: str) -> Frozen:
        entry = self.entry
        assert entry.lineage is not None
        held: tuple[int, ...] = ()
        if not entry.opened and member == entry.lineage.origin:
            held = (0, 1, 2)
        elif entry.opened:
            held = self.holds.get(member, ())
        return Frozen(
            job="job",
            generation=entry.generation,
            lineage=entry.lineage.number,
            slices=held,
            versions=(self.base,) * len(held),
            sums=(FullSums(step=self.base + 1, workers=(), slices=()),),
            record=self.record,
            fresh=not entry.opened and member != entry.lineage.origin,
        )

    def planned(self, *shards: str) -> list[Instruction]:
        said: list[Instruction] = []
        for shard in shards or [shard.id for shard in self.entry.shards]:
            answer = Planned(job="job", generation=self.entry.generation)
            said = self.membership.planned(shard, answer, self.now)
        return said

    def confirm(self, *members: str) -> None:
        self._hold()
        for member in members or [one.id for one in self.membership.members]:
            answer = Opened(job="job", generation=self.entry.generation)
            self.membership.opened(member, answer)

    def renew(self, member: str, version: int = 0, **changes: object) -> list[Instruction]:
        standing = Standing(job="job", generation=self.entry.generation, version=version)
        standing = replace(standing, **changes)  # type: ignore[arg-type]
        return self.membership.renewed(member, standing, self.now)

    def _hold(self) -> None:
        """From the opening on, every shard holds what is placed on it."""
        owners = [self.entry.shards[owner].id for owner in self.entry.placement]
        self.holds = {s: tuple(n for n, o in enumerate(owners) if o == s) for s in owners}

    def make_generation(self) -> list[Instruction]:
        """From a tick to an open generation, without a hitch."""
        self.swap()
        self.written()
        self.freeze()
        said = self.planned()
        if self.phase is Phase.MARKING:
            said = self.written()
        assert self.phase is Phase.OPEN
        self.confirm()
        return said
