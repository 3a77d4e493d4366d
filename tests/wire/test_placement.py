"""A model is refused with its first fault, and compared with another in one sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.jobs import BIAS, EMBEDDING, WEIGHT, job, jobs, tensor

from adashard.wire import placement
from adashard.wire.errors import AdashardError, InvalidRequest, UnsupportedParameter
from adashard.wire.placement import (
    CLUSTER_DEFAULT,
    DIMENSIONS_MAX,
    ELEMENTS_MAX,
    NAME_LENGTH_MAX,
    SLICE_BYTES_MAX,
    SLICE_BYTES_MIN,
    SLICES_MAX,
    WORKERS_MAX,
    first_difference,
    validate_spec,
)
from adashard.wire.spec import (
    AdafactorLayout,
    EpsPlacement,
    FactoredAxes,
    Group,
    JobSpec,
    Recovery,
)

MOMENTUM = (Group(adafactor=AdafactorLayout(momentum=True)),)

# --- limits --------------------------------------------------------------------------------------


@given(jobs())
def test_a_job_within_the_limits_is_accepted(spec: JobSpec):
    validate_spec(spec)


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        (job(), InvalidRequest, "parameters is 0"),
        (job(WEIGHT, groups=()), InvalidRequest, "groups is 0"),
        (job(WEIGHT, slice_bytes=SLICE_BYTES_MIN - 1), InvalidRequest, "slice_bytes is 63"),
        (job(WEIGHT, slice_bytes=SLICE_BYTES_MAX + 1), InvalidRequest, "slice_bytes is"),
        (job(WEIGHT, min_workers=0), InvalidRequest, "min_workers is 0; 1 to 64 are allowed"),
        (job(WEIGHT, min_workers=WORKERS_MAX + 1), InvalidRequest, "min_workers is 65"),
        (job(WEIGHT, BIAS, WEIGHT), InvalidRequest, "0 and 2 have the same name 'weight'"),
        (job(tensor("")), InvalidRequest, "name of parameter 0 has 0 characters"),
        (job(tensor("n" * (NAME_LENGTH_MAX + 1))), InvalidRequest, "has 513 characters"),
        (job(tensor("w", 2, group=1)), InvalidRequest, "'w' is of group 1, and there are 1"),
        (job(tensor("w", 2, group=-1)), InvalidRequest, "'w' is of group -1"),
        (job(tensor("w", 3, 0)), UnsupportedParameter, r"no elements: its shape is \(3, 0\)"),
        (job(tensor("w", -3, -2)), UnsupportedParameter, "no elements"),
        (job(tensor("w", *[1] * 9)), UnsupportedParameter, "'w' has 9 axes; 8 are allowed"),
        (job(tensor("w", ELEMENTS_MAX, 2)), UnsupportedParameter, "'w' has 2199023255552 el"),
        (job(WEIGHT, groups=(Group(),)), InvalidRequest, "group 0 names no optimizer"),
        (job(WEIGHT, recovery=Recovery.UNSPECIFIED), InvalidRequest, "what a dead shard is"),
        (job(WEIGHT, groups=MOMENTUM), InvalidRequest, "group 0 has a first moment, which no work"),
    ],
)
def test_what_is_out_of_the_limits_is_refused_by_name(
    spec: JobSpec, kind: type[AdashardError], words: str
):
    with pytest.raises(kind, match=words):
        validate_spec(spec)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (AdafactorLayout(factored_axes=FactoredAxes.UNSPECIFIED), "which axes are factored"),
        (AdafactorLayout(eps_placement=EpsPlacement.UNSPECIFIED), "where eps is placed"),
        (AdafactorLayout(min_dim_size_to_factor=0), "min_dim_size_to_factor of group 1 is 0"),
    ],
)
def test_a_layout_that_is_not_whole_is_refused(layout: AdafactorLayout, words: str):
    spec = job(WEIGHT, groups=(Group(adafactor=AdafactorLayout()), Group(adafactor=layout)))
    with pytest.raises(InvalidRequest, match=words):
        validate_spec(spec)


def test_what_stands_on_a_limit_is_accepted():
    validate_spec(
        job(
            tensor("n" * NAME_LENGTH_MAX, *[1] * DIMENSIONS_MAX),
            tensor("large", ELEMENTS_MAX),
            slice_bytes=SLICE_BYTES_MAX,
            min_workers=WORKERS_MAX,
        )
    )
    validate_spec(job(WEIGHT, slice_bytes=SLICE_BYTES_MIN))


def test_a_model_of_too_many_slices_is_refused_with_the_setting_that_makes_them():
    rows = tensor("rows", SLICES_MAX, SLICE_BYTES_MIN // 4)
    validate_spec(job(rows, slice_bytes=SLICE_BYTES_MIN))
    with pytest.raises(InvalidRequest, match="slice_bytes=64 cuts the model into 1048577") as error:
        validate_spec(job(rows, BIAS, slice_bytes=SLICE_BYTES_MIN))
    assert error.value.facts["setting"] == "slice_bytes"
    assert "larger slice_bytes=" in error.value.remedy
    validate_spec(job(rows, BIAS, slice_bytes=CLUSTER_DEFAULT))


def test_too_many_parameters_are_refused_before_they_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(placement, "PARAMETERS_MAX", 2)
    with pytest.raises(InvalidRequest, match="parameters is 3; 1 to 2 are allowed"):
        validate_spec(job(WEIGHT, BIAS, EMBEDDING))


# --- differences ---------------------------------------------------------------------------------


@given(jobs(), st.integers(1, WORKERS_MAX))
def test_a_job_does_not_differ_from_itself_whatever_min_workers_is(spec: JobSpec, workers: int):
    assert first_difference(spec, replace(spec, min_workers=workers)) is None


@given(jobs(), jobs())
def test_a_difference_is_found_whenever_there_is_one(mine: JobSpec, theirs: JobSpec):
    same = mine == replace(theirs, min_workers=mine.min_workers)
    assert (first_difference(mine, theirs) is None) == same


def test_an_optimizer_that_neither_side_knows_is_no_difference():
    assert first_difference(job(WEIGHT, groups=(Group(),)), job(WEIGHT, groups=(Group(),))) is None


CLAMPED = (Group(adafactor=AdafactorLayout(eps_placement=EpsPlacement.CLAMPED)),)


@pytest.mark.parametrize(
    ("mine", "theirs", "sentence"),
    [
        (
            job(BIAS, tensor("blocks.0.weight", 64, 32)),
            job(BIAS, tensor("blocks.0.weight", 64, 48)),
            "parameter 1 'blocks.0.weight': (64, 32) here, (64, 48) in the job",
        ),
        (
            job(WEIGHT),
            job(WEIGHT, BIAS),
            "parameter 1 'bias' (4,) of the job is missing here",
        ),
        (
            job(WEIGHT, BIAS),
            job(WEIGHT),
            "parameter 1 'bias' (4,) is not in the job",
        ),
        (
            job(WEIGHT, BIAS),
            job(EMBEDDING, WEIGHT, BIAS),
            "parameter 0 'embedding' (9, 4) of the job is missing here",
        ),
        (
            job(EMBEDDING, WEIGHT, BIAS),
            job(WEIGHT, BIAS),
            "parameter 0 'embedding' (9, 4) is not in the job",
        ),
        (
            job(WEIGHT, tensor("bias", 4)),
            job(WEIGHT, tensor("shift", 4)),
            "parameter 1 is 'bias' (4,) here, 'shift' (4,) in the job",
        ),
        (
            job(WEIGHT, BIAS),
            job(BIAS, WEIGHT),
            "parameter 0 is 'weight' (4, 4) here, 'bias' (4,) in the job",
        ),
        (
            job(WEIGHT),
            job(tensor("weight", 4, 4, group=1)),
            "parameter 0 'weight': in group 0 here, in group 1 in the job",
        ),
        (
            job(WEIGHT),
            job(WEIGHT, groups=CLAMPED),
            "group 0, eps_placement: added here, clamped in the job",
        ),
        (
            job(WEIGHT, groups=MOMENTUM),
            job(WEIGHT),
            "group 0, momentum: True here, False in the job",
        ),
        (
            job(WEIGHT),
            job(WEIGHT, groups=CLAMPED * 2),
            "groups: 1 here, 2 in the job",
        ),
        (
            job(WEIGHT),
            job(WEIGHT, groups=(Group(),)),
            "group 0 has another optimizer here than in the job",
        ),
        (
            job(WEIGHT, slice_bytes=1 << 20),
            job(WEIGHT),
            "slice_bytes: 1048576 here, 4194304 in the job",
        ),
        (
            job(WEIGHT),
            job(WEIGHT, recovery=Recovery.CHECKPOINT),
            "recovery: from workers here, from checkpoint in the job",
        ),
        (
            job(tensor("weight", 1), groups=CLAMPED, slice_bytes=1 << 20),
            job(WEIGHT),
            "parameter 0 'weight': (1,) here, (4, 4) in the job",
        ),
    ],
)
def test_the_first_difference_is_said_in_one_sentence(
    mine: JobSpec, theirs: JobSpec, sentence: str
):
    assert first_difference(mine, theirs) == sentence
