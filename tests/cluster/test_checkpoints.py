"""Which checkpoints are kept, and which one a job goes on from."""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.cluster.scenes import SPEC

from adashard.wire.control import OnExisting, WorkerHello
from adashard.wire.errors import JobExists, ModelMismatch
from adashard.wire.messages import Lineage
from adashard.wire.spec import Parameter
from adashard_server.cluster.checkpoints import (
    Checkpoint,
    Checkpoints,
    CheckpointSettings,
    best,
    newest,
    superfluous,
)
from adashard_server.cluster.jobs import begin_job


def one(version: int, *, lineage: int = 1, origin: str = "", **others) -> Checkpoint:
    """A checkpoint of `version`, of a lineage that came from the checkpoint `origin` if any."""
    options = {"name": f"step-{version}", "generation": lineage + 1, **others}
    return Checkpoint(
        job="job",
        version=version,
        lineage=Lineage(number=lineage, origin="" if origin else "w", checkpoint=origin),
        spec=SPEC,
        **options,
    )


def names(found) -> list[str]:
    return [checkpoint.name for checkpoint in found]


SCORED = st.builds(
    lambda loss, finite, kept: {"loss": loss if finite else None, "finite": finite, "kept": kept},
    st.none() | st.floats(0, 9),
    st.booleans(),
    st.booleans(),
)


@given(st.lists(SCORED, max_size=12), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=200)
def test_rotation_keeps_the_newest_the_best_the_asked_for_and_the_last_finite_one(
    scores, keep_last: int, keep_best: int
) -> None:
    known = [one(version, **score) for version, score in enumerate(scores)]
    keep = CheckpointSettings(keep_last=keep_last, keep_best=keep_best)
    gone = superfluous(known, Lineage(number=1, origin="w"), keep)
    staying = [checkpoint for checkpoint in known if checkpoint not in gone]
    assert gone == [checkpoint for checkpoint in known if checkpoint in gone], "oldest first"
    assert staying[len(staying) - min(keep_last, len(known)) :] == known[-keep_last:]
    assert not any(checkpoint.kept for checkpoint in gone)
    assert newest(staying, None) == newest(known, None)
    assert best(staying)[:keep_best] == best(known)[:keep_best]
    most = keep_last + keep_best + 1 + sum(checkpoint.kept for checkpoint in known)
    assert len(staying) <= most
    assert superfluous(staying, Lineage(number=1, origin="w"), keep) == []


def test_nothing_is_removed_where_all_are_to_be_kept() -> None:
    known = [one(version) for version in range(9)]
    assert superfluous(known, known[0].lineage, CheckpointSettings(keep_last=0)) == []


def test_a_loss_that_is_not_finite_is_never_the_best_and_removes_no_finite_one() -> None:
    known = [one(1, loss=5.0), *(one(version, finite=False) for version in range(2, 9))]
    assert names(best(known)) == ["step-1"]
    gone = superfluous(known, known[0].lineage, CheckpointSettings(keep_last=2, keep_best=0))
    assert "step-1" not in names(gone)


def test_the_least_loss_is_the_best_and_of_equals_the_older_one() -> None:
    known = [one(1, loss=2.0), one(2, loss=1.0), one(3, loss=1.0), one(4, loss=math.pi)]
    assert names(best(known)) == ["step-2", "step-3", "step-1", "step-4"]


def test_another_history_under_the_same_name_is_left_alone() -> None:
    old = [one(version, lineage=1) for version in range(5)]
    mine = [one(version, lineage=9, name=f"step-{version}.2") for version in range(5)]
    gone = superfluous([*old, *mine], mine[0].lineage, CheckpointSettings(keep_last=1))
    assert {checkpoint.lineage.number for checkpoint in gone} == {9}
    assert newest([*old, *mine], Lineage(number=12, origin="w")) is None


def test_the_history_goes_on_through_the_checkpoint_that_a_lineage_came_from() -> None:
    old = [one(version, lineage=1) for version in range(5)]
    mine = [one(version, lineage=9, origin="step-4") for version in range(5, 8)]
    gone = superfluous([*old, *mine], mine[0].lineage, CheckpointSettings(keep_last=2, keep_best=0))
    assert names(gone) == ["step-0", "step-1", "step-2", "step-3", "step-4", "step-5"]


def test_a_checkpoint_that_seems_to_come_from_itself_ends_the_history() -> None:
    loop = one(5, lineage=3, origin="step-5")
    assert superfluous([loop], loop.lineage, CheckpointSettings()) == []


# --- where a job goes on -------------------------------------------------------------------------


def test_a_job_goes_on_from_the_newest_finite_one_of_its_lineage() -> None:
    known = [one(3), one(5), one(9, finite=False)]
    assert newest(known, Lineage(number=1, origin="w")) == known[1]


def test_an_older_and_higher_history_does_not_come_back() -> None:
    known = [one(50, lineage=1), one(60, lineage=1)]
    rolled_back = Lineage(number=7, origin="", checkpoint="step-50", base_version=50)
    assert newest(known, rolled_back) == known[0]
    known.append(one(55, lineage=7, origin="step-50"))
    assert newest(known, rolled_back) == known[2]
    assert newest(known, None) == known[2]


def test_one_that_no_shard_can_read_is_passed_over() -> None:
    all_of_them = Checkpoints(known=[one(3), one(5)])
    lineage = Lineage(number=8, origin="", checkpoint="step-5")
    all_of_them.unreadable("job", "step-5")
    assert all_of_them.newest("job", lineage) == one(3)
    all_of_them.unreadable("job", "step-3")
    assert all_of_them.newest("job", lineage) is None
    assert all_of_them.named("job", "step-3") is not None


def test_a_name_is_never_used_twice() -> None:
    all_of_them = Checkpoints(known=[one(5)], taken=["step-6"])
    assert all_of_them.free_name("job", 5) == "step-5.2"
    assert all_of_them.free_name("job", 6) == "step-6.2"
    assert all_of_them.free_name("other", 5) == "step-5"
    all_of_them.remove("job", "step-5")
    assert all_of_them.free_name("job", 5) == "step-5.2"
    assert all_of_them.newest("job", None) is None


# --- a job that begins from one ------------------------------------------------------------------

HELLO = WorkerHello(job="job", spec=replace(SPEC, min_workers=3, slice_bytes=0))


def begun(resume: dict[str, str] | None, hello: WorkerHello = HELLO, **others):
    spec = replace(SPEC, slice_bytes=128)
    known = [replace(one(5, **others), spec=spec), replace(one(9, generation=40), spec=spec)]
    return begin_job(hello, Checkpoints(known=known, resume=resume), 7, 4096)


def test_a_job_resumes_from_its_newest_checkpoint_with_its_slices() -> None:
    entry, stored = begun({"": ""})
    assert stored is not None
    assert stored.name == "step-9"
    assert entry.spec.slice_bytes == 128
    assert entry.spec.min_workers == 3
    assert entry.lineage is None


def test_a_job_resumes_from_the_checkpoint_that_was_named_and_others_do_not() -> None:
    _, stored = begun({"job": "step-5"})
    assert stored is not None
    assert stored.name == "step-5"
    assert begun({"other": "step-5"})[1] is None


def test_a_job_that_begins_anew_does_so_above_what_is_stored() -> None:
    for resume in (None, {"": ""}):
        hello = replace(HELLO, on_existing=OnExisting.REPLACE) if resume else HELLO
        entry, stored = begun(resume, hello)
        assert stored is None
        assert entry.generation == 40
        assert entry.spec.slice_bytes == 4096


def test_a_worker_with_another_model_is_told_the_first_difference() -> None:
    parameters = (Parameter(name="parameter-0", shape=(5,)), *SPEC.parameters[1:])
    hello = replace(HELLO, spec=replace(HELLO.spec, parameters=parameters))
    with pytest.raises(ModelMismatch, match=r"step-9.*'parameter-0': \(5,\) here, \(4,\) in"):
        begun({"": ""}, hello)


@pytest.mark.parametrize(
    "wish",
    [{"on_existing": OnExisting.ERROR}, {"version": 5, "fingerprint": "0" * 64}],
)
def test_a_worker_that_brings_a_state_or_wants_a_new_job_does_not_resume(wish) -> None:
    with pytest.raises(JobExists, match="step-9"):
        begun({"": ""}, replace(HELLO, **wish))
