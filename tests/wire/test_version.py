"""Which versions understand each other."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adashard.wire.errors import VersionSkew
from adashard.wire.version import VERSION, check_version

MAJOR, MINOR = (int(part) for part in VERSION.split(".")[:2])
parts = st.integers(0, 1000)


@given(parts, st.sampled_from(["", "rc1", ".dev0", "+local"]))
def test_the_same_minor_version_works_whatever_its_patch(patch, suffix):
    check_version(f"{MAJOR}.{MINOR}.{patch}{suffix}", whose="the worker")


@pytest.mark.parametrize("minor", [MINOR - 1, MINOR + 1])
def test_one_minor_version_apart_works(minor):
    check_version(f"{MAJOR}.{minor}.0", whose="the worker")


@given(parts, parts, parts)
def test_further_apart_is_refused_with_both_versions_and_which_to_upgrade(major, minor, patch):
    theirs = f"{major}.{minor}.{patch}"
    if major == MAJOR and abs(minor - MINOR) <= 1:
        return check_version(theirs, whose="the worker")
    with pytest.raises(VersionSkew, match="the worker") as refused:
        check_version(theirs, whose="the worker")
    assert refused.value.facts == {"theirs": theirs, "mine": VERSION}
    older = "the worker" if (major, minor) < (MAJOR, MINOR) else "this side"
    assert refused.value.remedy.endswith(f"upgrade {older}.")


@given(st.text().filter(lambda text: not text[:1].isdigit()))
@example("-0.0")
@example(" 0.1.0")
def test_what_is_no_version_is_refused_and_nothing_worse(theirs):
    with pytest.raises(VersionSkew):
        check_version(theirs, whose="the worker")


def test_a_version_without_end_is_not_repeated_in_full():
    with pytest.raises(VersionSkew) as refused:
        check_version("9" * 10_000, whose="the worker")
    assert len(str(refused.value)) < 300
