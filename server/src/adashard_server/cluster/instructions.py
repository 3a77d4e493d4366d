"""What the coordinator's decisions ask of whoever carries them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adashard.wire.control import FromCoordinator, SnapshotFile
from adashard.wire.messages import Entry
from adashard_server.cluster.checkpoints import Checkpoint


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Make a checkpoint of the files that shards have written; report the result.

    Attributes:
        checkpoint: what it will be.
        attempt: which attempt at it the files were written for.
        placement: by slice, the number of the shard whose files it is in.
        files: all of them.
        values: what workers had logged, as far as it is finite.
        not_finite: names of tensors and logged values that are not.
    """

    checkpoint: Checkpoint
    attempt: str
    placement: tuple[int, ...]
    files: tuple[SnapshotFile, ...]
    values: Mapping[str, float]
    not_finite: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Discard:
    """Remove what was written for an attempt at a checkpoint that has come to nothing."""

    job: str
    attempt: str


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove a checkpoint."""

    job: str
    name: str


Keep = Commit | Discard | Remove
"""What is done in the directory of checkpoints."""

Instruction = Tell | Swap | Announce | HangUp | StepDown | Keep
