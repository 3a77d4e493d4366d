"""What REST answers with: pydantic models, with the unit of every number.

Bytes and seconds are plain numbers and say so in their names; times are RFC 3339 in UTC. A number
that is not finite (a loss that has blown up) is null, since JSON has no name for it.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from adashard_server.cluster.statistics import (
    ClusterStatistics,
    Event,
    JobStatistics,
    JobStatus,
    MemberStatus,
    ShardStatistics,
    WorkerStatistics,
)
from adashard_server.telemetry.points import StepPoint

Item = TypeVar("Item")

Bytes = Annotated[int, Field(ge=0)]
ByKind = Annotated[
    dict[str, int], Field(description="Bytes by kind of state: row, column, vector, momentum.")
]


class Schema(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")


class Listing(Schema, Generic[Item]):
    """One page of a list."""

    items: list[Item]
    next_cursor: str | None = Field(
        description="Give this as `cursor` for the next page; null on the last one."
    )


class Health(Schema):
    """The process answers."""

    status: str = Field(description="Always `ok`.")
    version: str = Field(description="Version of the server.")


class Readiness(Schema):
    """Whether the cluster takes work."""

    ready: bool
    reasons: list[str] = Field(description="What readiness waits for; empty when ready.")


class Cluster(Schema):
    """The cluster at a glance."""

    version: str = Field(description="Version of the server.")
    address: str = Field(description="Where workers reach the coordinator over gRPC, `host:port`.")
    registry: str = Field(description="Where membership is kept: `memory` or `redis`.")
    uptime_s: float = Field(description="Seconds since the coordinator started.")
    ready: bool = Field(description="Whether the cluster takes work.")
    not_ready: list[str] = Field(description="What readiness waits for.")
    shard_count: int
    min_shards: int = Field(description="Shards that must be there before a job begins.")
    worker_count: int
    job_count: int

    @classmethod
    def of(cls, cluster: ClusterStatistics) -> Cluster:
        """The answer for these statistics."""
        return cls(
            version=cluster.version,
            address=cluster.address,
            registry=cluster.registry,
            uptime_s=cluster.uptime_s,
            ready=not cluster.not_ready,
            not_ready=list(cluster.not_ready),
            shard_count=cluster.shard_count,
            min_shards=cluster.min_shards,
            worker_count=cluster.worker_count,
            job_count=cluster.job_count,
        )


class CreatedCheckpoint(Schema):
    """A checkpoint that has just been made."""

    name: str = Field(description="Its name among those of the job.")
    version: int = Field(description="Steps that its weights have taken.")
    size_bytes: int = Field(description="Bytes of its files.")
    stall_s: float = Field(description="Seconds that no step has waited longer than for it.")


class Shard(Schema):
    """A shard, and what it holds over all jobs."""

    id: str
    index: int = Field(description="Its number in the cluster, from 0.")
    address: str = Field(description="`host:port` of its data plane.")
    host: str
    pid: int
    device: str = Field(description="For example `cpu` or `cuda:0`.")
    status: MemberStatus
    renewed_s_ago: float = Field(description="Seconds since it renewed its lease.")
    version: int | None = Field(description="Newest version it holds of any job; null for none.")
    versions: dict[str, int] = Field(description="Version it holds of each job.")
    bytes: Bytes = Field(description="Weights and optimizer state together.")
    weight_bytes: Bytes = Field(description="float32 weights.")
    state_bytes: ByKind
    refused_report_count: int = Field(
        description="Reports of other shards that it refused; a few where a generation changes."
    )

    @classmethod
    def of(cls, shard: ShardStatistics) -> Shard:
        """The answer for these statistics."""
        return cls(
            id=shard.id,
            index=shard.index,
            address=shard.address,
            host=shard.host,
            pid=shard.pid,
            device=shard.device,
            status=shard.status,
            renewed_s_ago=shard.renewed_s_ago,
            version=max(shard.versions.values(), default=None),
            versions=dict(shard.versions),
            bytes=shard.weight_bytes + sum(shard.state_bytes.values()),
            weight_bytes=shard.weight_bytes,
            state_bytes=dict(shard.state_bytes),
            refused_report_count=shard.refused_report_count,
        )


class Worker(Schema):
    """A worker in one job."""

    id: str
    job: str
    rank: int | None = Field(description="Its number in the job; null until it takes part.")
    host: str
    pid: int
    step: int | None = Field(description="Steps whose weights it holds; null for none.")
    status: MemberStatus
    renewed_s_ago: float = Field(description="Seconds since it renewed its lease.")

    @classmethod
    def of(cls, worker: WorkerStatistics) -> Worker:
        """The answer for these statistics."""
        return cls(
            id=worker.id,
            job=worker.job,
            rank=worker.rank,
            host=worker.host,
            pid=worker.pid,
            step=worker.version if worker.version >= 0 else None,
            status=worker.status,
            renewed_s_ago=worker.renewed_s_ago,
        )


class Job(Schema):
    """A job: where it stands and what it weighs."""

    name: str
    status: JobStatus
    status_reason: str = Field(description="Why it has this status; may be empty.")
    generation: int = Field(description="Grows with every change of membership or placement.")
    step: int = Field(description="Steps that the job has decided.")
    algorithm: str
    worker_count: int
    min_workers: int = Field(description="Workers that must be there before the first step.")
    shard_count: int
    parameter_count: int = Field(description="Tensors of the model.")
    element_count: int = Field(description="Numbers in these tensors.")
    slice_count: int
    slice_bytes: int = Field(description="Size above which a parameter is cut, in float32 bytes.")
    recovery: Literal["workers", "checkpoint"] = Field(
        description="Where the state of a dead shard comes from."
    )
    weight_bytes: Bytes = Field(description="float32 weights on all shards.")
    state_bytes: Bytes = Field(description="Optimizer state on all shards.")
    adam_bytes: Bytes = Field(description="What Adam would hold as optimizer state.")

    @classmethod
    def of(cls, job: JobStatistics) -> Job:
        """The answer for these statistics."""
        return cls.model_validate(_job_fields(job))


class State(Schema):
    """How much optimizer state a job holds, and where."""

    job: str
    total_bytes: Bytes = Field(description="Optimizer state on all shards.")
    adam_bytes: Bytes = Field(description="What Adam would hold: two numbers per weight, float32.")
    adam_ratio: float | None = Field(description="total_bytes / adam_bytes; null without weights.")
    weight_bytes: Bytes = Field(description="float32 weights on all shards.")
    by_shard: dict[str, int] = Field(description="Bytes of optimizer state by id of the shard.")
    by_kind: ByKind

    @classmethod
    def of(cls, job: JobStatistics) -> State:
        """The answer for these statistics."""
        total = sum(job.state_bytes.values())
        return cls(
            job=job.name,
            total_bytes=total,
            adam_bytes=job.adam_bytes,
            adam_ratio=total / job.adam_bytes if job.adam_bytes else None,
            weight_bytes=job.weight_bytes,
            by_shard=dict(job.state_bytes_by_shard),
            by_kind=dict(job.state_bytes),
        )


class Step(Schema):
    """One step of a job, over all its shards."""

    step: int
    time: datetime = Field(description="When the last shard was done with it.")
    interval_s: float | None = Field(
        description="Seconds since the step before; null for the first."
    )
    duration_s: float = Field(description="Seconds from the first frame to the last reply.")
    phase_s: dict[str, float] = Field(
        description="Seconds by phase on the slowest shard: receive, wait, exchange, apply, reply."
    )
    gradient_norm: float | None = Field(description="Norm of the mean gradient.")
    update_rms: float | None = Field(
        description="Root mean square of the update before the step size."
    )
    clip_ratio: float | None = Field(
        description="Largest factor an update was divided by to clip it; 1 for none."
    )
    lr_requested: float = Field(description="Learning rate of the first group, as asked for.")
    lr_applied: float = Field(description="Step size of the first group, as applied.")
    pushed_bytes: Bytes = Field(description="Gradients received for this step.")
    pulled_bytes: Bytes = Field(description="Weights sent for this step.")
    skipped: bool = Field(description="Whether the step left the weights alone.")
    loss: float | None = Field(description="Mean of the workers' losses; null if none was logged.")
    values: dict[str, float | None] = Field(description="Means of all that workers logged.")

    @classmethod
    def of(cls, point: StepPoint) -> Step:
        """The answer for this point."""
        return cls(
            step=point.step,
            time=utc(point.time_s),
            interval_s=point.interval_s,
            duration_s=point.duration_s,
            phase_s=dict(point.phase_s),
            gradient_norm=_finite(point.gradient_norm),
            update_rms=_finite(point.update_rms),
            clip_ratio=_finite(point.clip_ratio),
            lr_requested=point.lr_requested,
            lr_applied=point.lr_applied,
            pushed_bytes=point.pushed_bytes,
            pulled_bytes=point.pulled_bytes,
            skipped=point.skipped,
            loss=_finite(point.loss),
            values={name: _finite(value) for name, value in point.values.items()},
        )


class JobDetail(Job):
    """A job, with its newest step."""

    steps_per_second: float = Field(description="Over the last 30 seconds; 0 when it halts.")
    latest: Step | None = Field(description="The newest step that is told about.")

    @classmethod
    def of_history(
        cls, job: JobStatistics, *, steps_per_second: float, latest: StepPoint | None
    ) -> JobDetail:
        """The answer for these statistics and what the history says."""
        newest = Step.of(latest) if latest is not None else None
        fields = {"steps_per_second": steps_per_second, "latest": newest}
        return cls.model_validate(_job_fields(job) | fields)


class MembershipEvent(Schema):
    """A change of membership, or another change worth telling."""

    sequence: int = Field(description="Grows by one with every event of the coordinator.")
    time: datetime
    job: str = Field(description="The job that changed; empty for the cluster.")
    name: str = Field(description="What happened, as a constant word.")
    text: str = Field(description="What happened, as a sentence.")
    facts: dict[str, str]

    @classmethod
    def of(cls, event: Event) -> MembershipEvent:
        """The answer for this event."""
        return cls(
            sequence=event.sequence,
            time=utc(event.time_s),
            job=event.job,
            name=event.name,
            text=event.text,
            facts=dict(event.facts),
        )


class StepUpdate(Schema):
    """Data of a `step` event: the steps that were added or changed since the one before."""

    job: str
    steps_per_second: float
    latest_step: int = Field(
        description="The newest step of the job; later ones that a reader has are void."
    )
    items: list[Step]


class StatusUpdate(Schema):
    """Data of a `status` event: how everything stands, once a second."""

    time: datetime
    cluster: Cluster
    jobs: list[Job]
    shards: list[Shard]
    workers: list[Worker] = Field(description="Of the job that is watched, or of all.")


class ErrorDescription(Schema):
    """One class of the catalogue of errors."""

    code: str
    status: int
    title: str
    hint: str


def utc(time_s: float) -> datetime:
    """A time in seconds since 1970 as a time with its zone."""
    return datetime.fromtimestamp(time_s, UTC)


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _job_fields(job: JobStatistics) -> dict[str, object]:
    same = Job.model_fields.keys() - {"step", "state_bytes"}
    fields: dict[str, object] = {name: getattr(job, name) for name in same}
    return fields | {"step": max(0, job.version), "state_bytes": sum(job.state_bytes.values())}
