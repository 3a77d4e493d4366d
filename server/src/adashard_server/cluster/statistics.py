"""What the coordinator tells people about itself: immutable records, made when asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

MemberStatus = Literal["joining", "live", "silent", "leaving", "draining"]
JobStatus = Literal["waiting", "changing", "running", "lost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatistics:
    """A shard as the coordinator knows it; bytes are summed over jobs."""

    id: str
    index: int
    address: str
    host: str
    pid: int
    device: str
    status: MemberStatus
    renewed_s_ago: float
    versions: Mapping[str, int]
    weight_bytes: int
    state_bytes: Mapping[str, int]
    refused_report_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatistics:
    """A worker as the coordinator knows it; `rank` is None until it is part of a generation."""

    id: str
    job: str
    rank: int | None
    host: str
    pid: int
    version: int
    status: MemberStatus
    renewed_s_ago: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatistics:
    """A job: where it stands and what it weighs."""

    name: str
    status: JobStatus
    status_reason: str
    generation: int
    version: int
    algorithm: str
    worker_count: int
    min_workers: int
    shard_count: int
    parameter_count: int
    element_count: int
    slice_count: int
    slice_bytes: int
    recovery: Literal["workers", "checkpoint"]
    weight_bytes: int
    state_bytes: Mapping[str, int]
    state_bytes_by_shard: Mapping[str, int]
    adam_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatistics:
    """The cluster at a glance; `not_ready` says what readiness waits for.

    `address` is the `host:port` that workers reach the coordinator at.
    """

    version: str
    address: str
    registry: str
    uptime_s: float
    shard_count: int
    min_shards: int
    worker_count: int
    job_count: int
    not_ready: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A change worth telling: membership, generations, losses."""

    sequence: int
    time_s: float
    job: str
    name: str
    text: str
    facts: Mapping[str, str]


class ClusterView(Protocol):
    """What REST and metrics read of the coordinator; called in its own thread."""

    def cluster_statistics(self) -> ClusterStatistics:
        """The cluster at a glance."""

    def shard_statistics(self) -> list[ShardStatistics]:
        """All shards, by index."""

    def worker_statistics(self, job: str | None = None) -> list[WorkerStatistics]:
        """Workers of one job or of all, by job and rank."""

    def job_statistics(self) -> list[JobStatistics]:
        """All jobs, by name."""

    def events(self, after: int = 0, job: str | None = None) -> list[Event]:
        """Events with a sequence number above `after`, oldest first."""
