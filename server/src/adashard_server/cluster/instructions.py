"""What the coordinator's decisions ask of whoever carries them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adashard.wire.control import FromCoordinator
from adashard.wire.messages import Entry


@dataclass(frozen=True, slots=True)
class Tell:
    """Send `message` to a member, if its control stream stands."""

    member: str
    message: FromCoordinator


@dataclass(frozen=True, slots=True)
class Swap:
    """Write `entry` to the registry if it holds `expected`; report the result."""

    entry: Entry
    expected: tuple[int, str]


@dataclass(frozen=True, slots=True)
class Announce:
    """Log an event that people should know of."""

    job: str
    name: str
    text: str
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HangUp:
    """End a member's control stream once what it was told has been sent."""

    member: str


@dataclass(frozen=True, slots=True)
class StepDown:
    """Another coordinator has taken over: end this process."""

    reason: str


Instruction = Tell | Swap | Announce | HangUp | StepDown
