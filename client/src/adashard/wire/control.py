"""The messages of control streams, as frozen dataclasses: what members and coordinator say.

Each mirrors the message of the same name in `protos/`, field by field, where meaning and units are
documented. What travels between workers and shards, and what both speak of, is in `messages.py`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from adashard.wire.messages import Entry, ErrorInfo, Plan, Record
from adashard.wire.spec import JobSpec


class OnExisting(enum.IntEnum):
    """What a worker wants when its job exists already."""

    UNSPECIFIED = 0
    RESUME = 1
    REPLACE = 2
    ERROR = 3


# --- control stream: member to coordinator -------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHello:
    """A worker that wants to take part in a job."""

    job: str
    spec: JobSpec
    on_existing: OnExisting = OnExisting.RESUME
    generation: int = 0
    version: int = 0
    fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHello:
    """A shard that offers room."""

    address: str
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of a member: who it is, and which version it speaks."""

    id: str
    version: str
    host: str
    pid: int
    token: str = ""
    worker: WorkerHello | None = None
    shard: ShardHello | None = None
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a member stands in one job."""

    job: str
    generation: int
    version: int
    leaving: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a shard holds of a job, in bytes."""

    job: str
    weight_bytes: int
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    refused_report_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """Says that the member is alive, and where it stands."""

    standings: tuple[Standing, ...] = ()
    broken_links: tuple[str, ...] = ()
    draining: bool = False
    holdings: tuple[Holding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FullSums:
    """Sums that a shard holds complete."""

    step: int
    workers: tuple[str, ...]
    slices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """Answers `Freeze`: what the member holds; nothing older is accepted any more."""

    job: str
    generation: int
    lineage: int = 0
    slices: tuple[int, ...] = ()
    versions: tuple[int, ...] = ()
    sums: tuple[FullSums, ...] = ()
    record: Record | None = None
    fresh: bool = False
    complete: bool = False
    leaving: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Every slice placed on this shard is at its target."""

    job: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The member has opened the generation."""

    job: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stale:
    """The member has promised a higher generation."""

    job: str
    promised: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSummary:
    """Numbers of one step on one shard, for people."""

    job: str
    step: int
    phase_s: Mapping[str, float] = field(default_factory=dict)
    duration_s: float = 0.0
    gradient_squared_sum: float = 0.0
    update_squared_sum: float = 0.0
    element_count: int = 0
    clip_ratio: float = 1.0
    lr_requested: float = 0.0
    lr_applied: float = 0.0
    pushed_bytes: int = 0
    pulled_bytes: int = 0
    skipped: bool = False
    not_finite_workers: tuple[str, ...] = ()
    not_finite_parameters: tuple[str, ...] = ()


CHECKPOINT_UNREADABLE = "checkpoint_unreadable"
"""The one name in `Happened` on which a coordinator acts; its facts name the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """Something that people should know of, which a member alone has seen."""

    job: str
    name: str
    text: str
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFile:
    """One file of a shard's snapshot."""

    name: str
    byte_count: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshotted:
    """Answers `SnapshotRequest`: the files are written and synced, or why not."""

    job: str
    generation: int
    version: int
    files: tuple[SnapshotFile, ...] = ()
    stall_s: float = 0.0
    slices: tuple[int, ...] = ()
    record: Record | None = None
    error: ErrorInfo | None = None
    not_finite: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """What a worker's loop reports."""

    job: str
    step: int
    values: Mapping[str, float] = field(default_factory=dict)


# --- control stream: coordinator to member -------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Answers `Hello`."""

    version: str
    lease_s: float
    renew_s: float
    job_version: int = -1
    checkpoint_dir: str = ""
    checkpoint_mark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze:
    """First moment of a change of generation."""

    entry: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Second moment: bring the slices to where the plan says."""

    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Third moment: go on from here."""

    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRequest:
    """Write the job's slices at one version, when it is reached and before the next step."""

    job: str
    generation: int
    version: int
    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bye:
    """The member is no longer part of the job, or never will be."""

    job: str
    generation: int
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something worth a line in the member's log."""

    job: str
    text: str


FromMember = (
    Hello
    | Renewal
    | Frozen
    | Planned
    | Opened
    | Stale
    | StepSummary
    | Logged
    | Happened
    | Snapshotted
)
FromCoordinator = Welcome | Freeze | PlanRequest | Open | Bye | Notice | SnapshotRequest
