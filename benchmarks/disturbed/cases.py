"""Every fault that a run is disturbed by, and what a run has to come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adashard.failpoints import POINTS, Action, Fault, Role

WORKERS = 2
CALM_STEPS = 3
STEPS = 6

FIRST_OF_A_CHANGE = "swap.before"
"""From this point on, the table of fail points is about changes of generation."""

SECOND = frozenset(
    {"push.frame", "add.before", "add.after", "apply", "reply.frame", "reply.received"}
    | {"upload.frame", "upload.received", "freeze.sent", "planrequest.sent", "open.sent"}
)
"""Points at which the second passing tells more: something has been done, and something is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is done to a run.

    Attributes:
        killed: processes that are killed after the first steps, from outside, by their names.
        fault: what happens at a fail point then; None for nothing.
        role: of the process that it happens in.
        everywhere: whether in all processes of the role at once, instead of in one.
        from_start: whether it is placed before the job begins.
    """

    killed: tuple[str, ...] = ()
    fault: Fault | None = None
    role: Role = Role.SHARD
    everywhere: bool = False
    from_start: bool = False

    @property
    def loses_a_worker(self) -> bool:
        """Whether one is killed."""
        kills = self.fault is not None and self.fault.action is Action.KILL
        return kills and self.role is Role.WORKER

    def __str__(self) -> str:
        words = [f"{' and '.join(self.killed)} killed"] if self.killed else []
        if self.fault is not None:
            who = f"all {self.role.value}s" if self.everywhere else self.role.value
            fault = self.fault
            words.append(f"{who}: {fault.action.value} at {fault.point} {fault.passing}")
        return ", ".join(words) + (", from the start" if self.from_start else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step that a trainee has taken: which, when, and how many workers were in it."""

    step: int
    ended_s: float
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a run.

    Attributes:
        digests: of the weights of every trainee that lives, by its number.
        steps: of one of these, in order.
        happened_s: when the first of what was done to it happened; 0 for a calm run.
    """

    digests: Mapping[int, str]
    steps: tuple[Step, ...]
    happened_s: float = 0.0

    @property
    def recovery_s(self) -> float:
        """The longest that a step has taken since it happened, counted from then at the soonest."""
        began_s, longest_s = self.happened_s, 0.0
        for step in self.steps:
            if step.ended_s > self.happened_s:
                longest_s = max(longest_s, step.ended_s - began_s)
                began_s = step.ended_s
        return longest_s

    @property
    def survivor(self) -> int:
        """The number of the only trainee that lives; of all, where no one has died."""
        return min(self.digests)

    @property
    def last_together(self) -> int:
        """The last step with all workers in it."""
        return max(step.step for step in self.steps if step.workers == WORKERS)


def all_cases() -> Iterator[Case]:
    """Kills from outside, and every action at every point by every role that passes it."""
    yield from KILLS
    changing = False
    for name, point in POINTS.items():
        changing = changing or name == FIRST_OF_A_CHANGE
        for role in point.roles:
            for action in sorted(point.kind.value, key=list(Action).index):
                yield Case(
                    killed=("shard-1",) if changing else (),
                    fault=Fault(point=name, action=action, passing=2 if name in SECOND else 1),
                    role=role,
                )


def kill_at(point: str, role: Role, passing: int = 1, **options: bool) -> Case:
    """A process of a role that is killed at a point."""
    fault = Fault(point=point, action=Action.KILL, passing=passing)
    return Case(fault=fault, role=role, **options)


KILLS = (
    Case(killed=("shard-0",)),
    Case(killed=("shard-0", "shard-1")),
    Case(killed=("coordinator",)),
    Case(killed=("coordinator", "shard-0")),
    Case(killed=("coordinator", "shard-0", "shard-1")),
    kill_at("commit", Role.SHARD, everywhere=True),
    kill_at("apply", Role.SHARD, passing=2, everywhere=True),
    kill_at("reply.frame", Role.SHARD, everywhere=True),
    kill_at("swap.after", Role.COORDINATOR, from_start=True),
    kill_at("upload.received", Role.SHARD, from_start=True),
)
"""Several at once, between steps, and before the first step."""
