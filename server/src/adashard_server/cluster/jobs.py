"""What a job may be, and who may join it: decided at a worker's hello. Pure."""

from __future__ import annotations

from dataclasses import replace

from adashard.wire.errors import InvalidRequest, JobExists, JobLost, ModelMismatch, Overloaded
from adashard.wire.messages import Entry, OnExisting, WorkerHello
from adashard.wire.placement import CLUSTER_DEFAULT, WORKERS_MAX, first_difference, validate_spec
from adashard.wire.spec import JobSpec
from adashard_server.cluster.membership import Membership, Phase

JOBS_MAX = 1000
JOB_NAME_MAX = 128


def check_name(name: str) -> None:
    """Refuses names that could not be shown or stored.

    Raises:
        InvalidRequest: empty, too long, or with characters that cannot be printed.
    """
    fits = 0 < len(name) <= JOB_NAME_MAX and name.isprintable() and name.strip() == name
    if not fits or name in (".", ".."):  # which a browser would not send as part of a path
        raise InvalidRequest(
            f"job={name[:JOB_NAME_MAX]!r} is not a name: 1 to {JOB_NAME_MAX} printable characters"
        )


def new_spec(hello: WorkerHello, slice_bytes: int) -> JobSpec:
    """The specification of a job that `hello` begins.

    Args:
        hello: the first worker's.
        slice_bytes: the cluster's default, where the worker leaves it open.

    Raises:
        InvalidRequest: it cannot be right.
    """
    validate_spec(hello.spec)
    if hello.spec.slice_bytes == CLUSTER_DEFAULT:
        return replace(hello.spec, slice_bytes=slice_bytes)
    return hello.spec


def new_entry(hello: WorkerHello, generation: int, slice_bytes: int) -> Entry:
    """The entry of a job that `hello` begins, before its first generation.

    Args:
        hello: the first worker's.
        generation: the highest that any member has promised for a job of this name.
        slice_bytes: the cluster's default.

    Raises:
        InvalidRequest: the name or the specification cannot be right.
    """
    check_name(hello.job)
    spec = new_spec(hello, slice_bytes)
    return Entry(job=hello.job, generation=generation, author="", spec=spec)


def check_join(membership: Membership, hello: WorkerHello) -> bool:
    """Whether the job is to begin anew for this worker; it joins where it stands if not.

    Raises:
        JobExists: the worker does not want an existing job, or wants to replace a live one.
        ModelMismatch: with the first differing tensor and both shapes.
        JobLost: the job's state is gone and the worker wants to resume it.
        Overloaded: the job has as many workers as are allowed.
    """
    job, workers = hello.job, len(membership.worker_ids())
    if hello.on_existing is OnExisting.ERROR:
        raise JobExists(f"job {job!r} exists, at step {membership.version}", job=job)
    if hello.on_existing is OnExisting.REPLACE:
        if workers or membership.writing:
            raise JobExists(
                f"job {job!r} has {workers} live workers and cannot be replaced",
                remedy="Stop them first, or choose another job=.",
                job=job,
            )
        return True
    if membership.phase is Phase.LOST:
        raise JobLost(f"job {job!r} is lost: {membership.reason}", job=job)
    if difference := first_difference(hello.spec, membership.entry.spec):
        raise ModelMismatch(f"job {job!r} trains another model: {difference}", job=job)
    if workers >= WORKERS_MAX:
        raise Overloaded(f"job {job!r} has {workers} workers, the most that are allowed")
    return False
