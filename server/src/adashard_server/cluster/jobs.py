"""What a job may be, and who may join it: decided at a worker's hello. Pure."""

from __future__ import annotations

import re
from dataclasses import replace

from adashard.wire.control import OnExisting, WorkerHello
from adashard.wire.errors import InvalidRequest, JobExists, JobLost, ModelMismatch, Overloaded
from adashard.wire.messages import Entry
from adashard.wire.placement import CLUSTER_DEFAULT, WORKERS_MAX, first_difference, validate_spec
from adashard.wire.spec import JobSpec
from adashard_server.cluster.checkpoints import Checkpoint, Checkpoints
from adashard_server.cluster.membership import Membership, Phase
from adashard_server.cluster.succession import FRESH, Start

JOBS_MAX = 1000
SHARDS_MAX = 256
JOB_NAME_MAX = 128
_FINGERPRINT = re.compile("[0-9a-f]{64}")


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
    spec = hello.spec
    if spec.slice_bytes == CLUSTER_DEFAULT:
        spec = replace(spec, slice_bytes=slice_bytes)
    validate_spec(spec)
    return spec


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


def begin_job(
    hello: WorkerHello, checkpoints: Checkpoints, promised: int, slice_bytes: int
) -> tuple[Entry, Checkpoint | None]:
    """A job that is not here yet, and the checkpoint that it begins from, if it is to resume.

    Args:
        hello: the first worker's.
        checkpoints: those of the cluster.
        promised: the highest generation that any member has promised for a job of this name.
        slice_bytes: the cluster's default.

    Raises:
        AdashardError: as `new_entry` and `resumed_entry`.
    """
    generation = max(promised, checkpoints.generation(hello.job))
    anew = hello.on_existing is OnExisting.REPLACE
    stored = None if anew else checkpoints.resumable(hello.job)
    if stored is None:
        return new_entry(hello, generation, slice_bytes), None
    return resumed_entry(hello, stored, generation), stored


def resumed_entry(hello: WorkerHello, checkpoint: Checkpoint, generation: int) -> Entry:
    """The entry of a job that begins from a checkpoint, before its first generation.

    Args:
        hello: the first worker's; it says how many are needed.
        checkpoint: it brings the model and its `slice_bytes`.
        generation: the highest that any member or checkpoint of the job has seen.

    Raises:
        ModelMismatch: the worker has another model; with the first difference.
        JobExists: the worker does not want an existing job, or has loaded a state of its own.
    """
    job = hello.job
    where = f"job {job!r} resumes from checkpoint {checkpoint.name}"
    if hello.on_existing is OnExisting.ERROR or offer_of(hello) != FRESH:
        raise JobExists(
            f"{where}, and the worker brings a state of its own, or wants a new job",
            remedy="Join it without load_state_dict(), begin it anew with on_existing='replace', "
            "or choose another job=.",
            job=job,
        )
    if difference := first_difference(hello.spec, checkpoint.spec):
        raise ModelMismatch(f"{where}, which is of another model: {difference}", job=job)
    spec = replace(checkpoint.spec, min_workers=hello.spec.min_workers)
    validate_spec(spec)
    return Entry(job=job, generation=generation, author="", spec=spec)


def offer_of(hello: WorkerHello) -> Start:
    """What a worker would begin its job with.

    Raises:
        InvalidRequest: its version and fingerprint are not those of a state.
    """
    if not hello.fingerprint and hello.version == 0:
        return FRESH
    if hello.version < 1 or not _FINGERPRINT.fullmatch(hello.fingerprint):
        raise InvalidRequest(
            f"a state of step {hello.version} with the fingerprint {hello.fingerprint[:64]!r} "
            "cannot have been loaded"
        )
    return Start(hello.version, hello.fingerprint)


def check_join(membership: Membership, hello: WorkerHello) -> bool:
    """Whether the job is to begin anew for this worker; it joins where it stands if not.

    A worker that has loaded a state joins a job that has begun with the same. Where the job
    stands at the version of that state, it may have come to it: only the worker can tell, from
    what the shards hold.

    Raises:
        JobExists: the worker does not want an existing job, has loaded another state than the
            job's, or wants to replace a live job.
        ModelMismatch: with the first differing tensor and both shapes.
        JobLost: the job's state is gone and the worker wants to resume it.
        Overloaded: the job has as many workers as are allowed.
    """
    job, workers = hello.job, len(membership.worker_ids())
    if hello.on_existing is OnExisting.ERROR:
        raise JobExists(f"job {job!r} exists, at step {membership.version}", job=job)
    offer = offer_of(hello)
    same_start = offer != FRESH and offer == membership.start
    if hello.on_existing is OnExisting.REPLACE and not (workers and same_start):
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
    if offer != FRESH and not same_start:
        _compare_versions(membership, hello)
    if workers >= WORKERS_MAX:
        raise Overloaded(f"job {job!r} has {workers} workers, the most that are allowed")
    return False


def _compare_versions(membership: Membership, hello: WorkerHello) -> None:
    """Refuses a loaded state that cannot be the job's.

    Raises:
        JobExists: the two have different versions, or begin one job with different states.
    """
    job, start = hello.job, membership.start
    if start is None or (start == FRESH and membership.entry.lineage is None):
        return  # nobody has begun it, and nobody else brings a state
    standing = max(membership.version, start.version)
    if membership.entry.lineage is not None and standing == hello.version:
        return
    raise JobExists(
        f"job {job!r} is at step {standing}, and the worker has loaded another state, of step "
        f"{hello.version}",
        remedy="Join it without load_state_dict(), begin it anew with on_existing='replace' when "
        "it has no workers, or choose another job=.",
        job=job,
        version=standing,
        loaded=hello.version,
    )
