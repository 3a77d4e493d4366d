"""A job is what its first worker says, and who joins must mean the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adashard.wire.control import OnExisting, WorkerHello
from adashard.wire.errors import (
    InvalidRequest,
    JobExists,
    JobLost,
    ModelMismatch,
    Overloaded,
    UnsupportedParameter,
)
from adashard.wire.messages import Lineage, Member
from adashard.wire.placement import CLUSTER_DEFAULT, WORKERS_MAX
from adashard.wire.spec import AdafactorLayout, Group, JobSpec, Parameter
from adashard_server.cluster.jobs import (
    JOB_NAME_MAX,
    check_join,
    check_name,
    new_entry,
    new_spec,
    offer_of,
)
from adashard_server.cluster.membership import Membership, Phase
from adashard_server.cluster.succession import FRESH, Start

SPEC = JobSpec(
    parameters=(Parameter(name="weight", shape=(4, 3)),),
    groups=(Group(adafactor=AdafactorLayout()),),
    slice_bytes=4096,
    min_workers=2,
)
OTHER = replace(SPEC, parameters=(Parameter(name="weight", shape=(4, 5)),))


def a_hello(on_existing: OnExisting = OnExisting.RESUME, spec: JobSpec = SPEC) -> WorkerHello:
    return WorkerHello(job="job", spec=spec, on_existing=on_existing)


def a_job(*workers: str, phase: Phase = Phase.OPEN) -> Membership:
    members = tuple(Member(id=worker, rank=rank) for rank, worker in enumerate(workers))
    entry = replace(new_entry(a_hello(), 4, 8192), workers=members, author="c/1")
    return Membership(entry, "c", phase=phase)


@pytest.mark.parametrize("name", ["j", "...", "run 7", "größer", "x" * JOB_NAME_MAX])
def test_a_name_that_can_be_shown_is_a_name(name: str):
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", " run", "run ", "a\nb", "a\0b", "x" * (JOB_NAME_MAX + 1)]
)
def test_a_name_that_cannot_be_shown_is_refused(name: str):
    with pytest.raises(InvalidRequest, match="is not a name"):
        check_name(name)


def test_a_new_job_starts_above_every_generation_that_was_promised_for_its_name():
    entry = new_entry(a_hello(), 4, 8192)
    assert (entry.job, entry.generation, entry.spec) == ("job", 4, SPEC)
    assert entry.lineage is None
    assert not entry.opened


def test_where_a_worker_leaves_the_size_of_slices_open_the_cluster_decides():
    undecided = a_hello(spec=replace(SPEC, slice_bytes=CLUSTER_DEFAULT))
    assert new_spec(undecided, 8192) == replace(SPEC, slice_bytes=8192)
    assert new_spec(a_hello(), 8192) == SPEC
    assert check_join(a_job("w0"), undecided) is False


def test_a_job_that_cannot_be_trained_does_not_begin():
    empty = replace(SPEC, parameters=(Parameter(name="empty", shape=(0,)),))
    with pytest.raises(UnsupportedParameter, match="empty"):
        new_entry(a_hello(spec=empty), 0, 8192)


def test_a_worker_with_the_same_model_joins_where_the_job_stands():
    assert check_join(a_job("w0"), a_hello()) is False


def test_how_many_workers_the_first_step_needs_may_differ():
    assert check_join(a_job("w0"), a_hello(spec=replace(SPEC, min_workers=1))) is False


def test_a_worker_with_another_model_is_told_the_tensor_and_both_shapes():
    with pytest.raises(ModelMismatch) as raised:
        check_join(a_job("w0"), a_hello(spec=OTHER))
    assert "'weight'" in raised.value.message
    assert "(4, 5)" in raised.value.message
    assert "(4, 3)" in raised.value.message


def test_a_worker_that_wants_a_new_job_is_not_let_into_an_old_one():
    with pytest.raises(JobExists, match="exists, at step -1"):
        check_join(a_job(), a_hello(OnExisting.ERROR))


def test_a_job_without_workers_is_replaced_also_by_another_model():
    assert check_join(a_job(), a_hello(OnExisting.REPLACE, OTHER)) is True
    assert check_join(a_job(phase=Phase.LOST), a_hello(OnExisting.REPLACE)) is True


def test_a_job_with_live_workers_is_not_replaced():
    with pytest.raises(JobExists, match="1 live workers"):
        check_join(a_job("w0"), a_hello(OnExisting.REPLACE))


@pytest.mark.parametrize("phase", [Phase.SWAPPING, Phase.MARKING])
def test_a_job_that_is_being_written_is_not_replaced(phase: Phase):
    with pytest.raises(JobExists, match="cannot be replaced"):
        check_join(a_job(phase=phase), a_hello(OnExisting.REPLACE))


def test_a_job_whose_state_is_gone_is_not_resumed():
    lost = a_job(phase=Phase.LOST)
    lost.reason = "its shard is gone"
    with pytest.raises(JobLost, match="its shard is gone"):
        check_join(lost, a_hello())


def test_a_job_has_a_largest_number_of_workers():
    full = a_job(*(f"w{n}" for n in range(WORKERS_MAX)))
    with pytest.raises(Overloaded, match=str(WORKERS_MAX)):
        check_join(full, a_hello())


def test_slices_that_the_cluster_s_size_makes_too_many_are_refused():
    large = replace(SPEC, parameters=(Parameter(name="large", shape=(1 << 26, 4)),))
    undecided = a_hello(spec=replace(large, slice_bytes=CLUSTER_DEFAULT))
    assert new_spec(undecided, 1 << 20).slice_bytes == 1 << 20
    with pytest.raises(InvalidRequest, match="slices"):
        new_spec(undecided, 64)


# --- workers that have loaded a state ------------------------------------------------------------

A, B = "a" * 64, "b" * 64


def loaded(
    fingerprint: str, version: int = 10, on_existing: OnExisting = OnExisting.RESUME
) -> WorkerHello:
    return replace(a_hello(on_existing), version=version, fingerprint=fingerprint)


def begun(*workers: str, fingerprint: str = "", base: int = 0, stands_at: int = 0) -> Membership:
    """A job that has begun, and stands at a step."""
    membership = a_job(*workers)
    lineage = Lineage(number=5, origin="w0", base_version=base, fingerprint=fingerprint)
    shards = (Member(id="shard-0"),)
    membership.entry = replace(membership.entry, lineage=lineage, shards=shards, opened=True)
    membership.versions["shard-0"] = stands_at
    return membership


def waiting(*hellos: WorkerHello) -> Membership:
    """A job that has not begun, and the workers that wait for others."""
    membership = Membership(new_entry(hellos[0], 0, 8192), "c")
    for number, hello in enumerate(hellos):
        membership.join(f"w{number}", offer_of(hello))
    return membership


def test_what_a_worker_would_begin_with_is_in_its_hello():
    assert offer_of(a_hello()) == FRESH
    assert offer_of(loaded(A)) == Start(10, A)


@pytest.mark.parametrize(
    ("version", "fingerprint"), [(0, A), (-1, A), (3, ""), (3, "x"), (3, A + A)]
)
def test_a_state_that_cannot_have_been_loaded_is_refused(version: int, fingerprint: str):
    with pytest.raises(InvalidRequest, match="cannot have been loaded"):
        check_join(begun(), loaded(fingerprint, version))


def test_workers_that_have_loaded_the_same_state_join_each_other():
    assert check_join(waiting(loaded(A)), loaded(A)) is False
    assert check_join(begun("w0", fingerprint=A, base=10, stands_at=15), loaded(A)) is False


def test_a_fresh_worker_joins_whatever_the_job_has_begun_with():
    assert check_join(waiting(loaded(A)), a_hello()) is False
    assert check_join(begun("w0", fingerprint=A, base=10, stands_at=15), a_hello()) is False


def test_a_worker_that_has_loaded_a_state_joins_fresh_ones_that_still_wait():
    assert check_join(waiting(a_hello()), loaded(A)) is False


@pytest.mark.parametrize(
    ("membership", "standing"),
    [
        (waiting(loaded(B, 7)), 7),
        (waiting(a_hello(), loaded(B)), 10),
        (begun("w0", stands_at=12), 12),
        (begun(stands_at=12), 12),
        (begun("w0", fingerprint=B, base=7, stands_at=9), 9),
        (begun("w0", fingerprint=B, base=7, stands_at=-1), 7),
    ],
    ids=["waits", "waits too", "fresh", "fresh without workers", "loaded", "not yet open"],
)
def test_another_state_than_the_job_s_is_refused_with_both_steps_and_the_remedy(
    membership: Membership, standing: int
):
    with pytest.raises(JobExists, match=f"at step {standing}, .* of step 10") as raised:
        check_join(membership, loaded(A))
    assert "on_existing='replace'" in raised.value.remedy
    assert raised.value.facts == {"job": "job", "version": str(standing), "loaded": "10"}


def test_a_job_at_the_version_of_a_loaded_state_may_have_come_to_it():
    """The worker compares; nobody else can."""
    assert check_join(begun(stands_at=10), loaded(A)) is False
    assert check_join(begun("w0", fingerprint=B, base=7, stands_at=10), loaded(A)) is False


def test_of_workers_that_replace_a_job_by_one_state_the_first_does_and_the_others_join():
    replaces = loaded(A, on_existing=OnExisting.REPLACE)
    assert check_join(begun(fingerprint=A, base=10, stands_at=15), replaces) is True
    assert check_join(begun("w0", fingerprint=A, base=10, stands_at=10), replaces) is False
    assert check_join(waiting(loaded(A)), replaces) is False
    with pytest.raises(JobExists, match="1 live workers"):
        check_join(begun("w0", fingerprint=B, base=10, stands_at=10), replaces)
