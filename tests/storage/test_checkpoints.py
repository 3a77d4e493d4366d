"""The directory of checkpoints: what bears the name of one is whole, whoever dies when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tests.storage.stored import ATTEMPT, SPEC, filled, stored

from adashard.wire.errors import CheckpointUnreadable, CheckpointUnwritable
from adashard.wire.messages import Lineage
from adashard_server.storage.checkpoints import (
    CheckpointDirectory,
    Damaged,
    check_seen,
    checkpoint_folder,
    checkpoints,
    discard,
    folder_name,
    partial_folder,
)
from adashard_server.storage.manifest import NAME, read_manifest

JOBS = st.text(min_size=1, max_size=128)


@given(one=JOBS, other=JOBS)
def test_every_job_has_a_folder_of_its_own(one: str, other: str) -> None:
    names = folder_name(one), folder_name(other)
    assert (names[0] == names[1]) == (one == other)
    for name in names:
        assert "/" not in name
        assert not name.startswith(".")
        assert len(name) <= 255


def test_a_name_that_fits_is_left_as_it_is() -> None:
    assert folder_name("gpt2-small_3.1") == "gpt2-small_3.1"


def test_checkpoints_are_listed_as_they_follow_each_other(tmp_path: Path) -> None:
    held = filled(SPEC)
    for version, lineage in ((5, 1), (10, 1), (7, 4)):
        stored(tmp_path, held, version=version, lineage=Lineage(number=lineage, origin="w"))
    stored(tmp_path, held, version=1, job="another")
    found = checkpoints(tmp_path)
    assert [(one.job, one.version) for one in found] == [
        ("another", 1),
        ("job", 5),
        ("job", 10),
        ("job", 7),
    ]
    assert checkpoints(tmp_path, "another") == found[:1]


def test_a_half_written_one_is_not_listed_and_goes_with_the_next_coordinator(
    tmp_path: Path,
) -> None:
    left = partial_folder(tmp_path, "job", ATTEMPT.format(version=7))
    left.mkdir(parents=True)
    (left / "shard-0-weights.safetensors").write_bytes(b"half")
    stored(tmp_path, filled(SPEC), version=5)
    assert [one.version for one in checkpoints(tmp_path)] == [5]
    CheckpointDirectory(tmp_path).claim()
    assert not left.exists()
    assert [one.version for one in checkpoints(tmp_path)] == [5]


def test_a_damaged_one_is_listed_as_that(tmp_path: Path) -> None:
    folder = stored(tmp_path, filled(SPEC))
    (folder / NAME).write_text("{")
    (found,) = checkpoints(tmp_path)
    assert isinstance(found, Damaged)
    assert "damaged" in found.error.message


def test_one_that_was_moved_to_another_job_is_not_taken_for_its_own(tmp_path: Path) -> None:
    folder = stored(tmp_path, filled(SPEC))
    (tmp_path / "another").mkdir()
    folder.rename(tmp_path / "another" / folder.name)
    (found,) = checkpoints(tmp_path)
    assert isinstance(found, Damaged)
    assert "of job 'job', and not in its place" in found.error.message


def test_files_that_no_coordinator_sees_make_no_checkpoint(tmp_path: Path) -> None:
    folder = stored(tmp_path, filled(SPEC))
    manifest = read_manifest(folder)
    attempt = ATTEMPT.format(version=5)
    elsewhere = partial_folder(tmp_path, "job", attempt)
    with pytest.raises(CheckpointUnreadable, match="not where its shard wrote it"):
        CheckpointDirectory(tmp_path).commit(manifest, attempt)
    elsewhere.mkdir(parents=True)
    for file in manifest.files:
        (elsewhere / file.name).write_bytes(b"short")
    with pytest.raises(CheckpointUnreadable, match="has 5 bytes"):
        CheckpointDirectory(tmp_path).commit(manifest, attempt)


def test_one_is_never_written_over_another(tmp_path: Path) -> None:
    folder = stored(tmp_path, filled(SPEC))
    before = (folder / NAME).read_bytes()
    with pytest.raises(CheckpointUnwritable, match="step-5"):
        stored(tmp_path, filled(SPEC, seed=1))
    assert (folder / NAME).read_bytes() == before


def test_a_removed_one_is_gone_at_once(tmp_path: Path) -> None:
    stored(tmp_path, filled(SPEC))
    CheckpointDirectory(tmp_path).remove("job", "step-5")
    assert checkpoints(tmp_path) == []
    assert list((tmp_path / "job").iterdir()) == []
    with pytest.raises(CheckpointUnwritable, match="step-5"):
        CheckpointDirectory(tmp_path).remove("job", "step-5")


def test_what_was_written_for_nothing_is_removed(tmp_path: Path) -> None:
    folder = partial_folder(tmp_path, "job", ATTEMPT.format(version=5))
    folder.mkdir(parents=True)
    discard(tmp_path, "job", ATTEMPT.format(version=5))
    assert not folder.exists()
    discard(tmp_path, "job", ATTEMPT.format(version=5))


@pytest.mark.parametrize(
    "name", ["..", "step-5/..", "", "step-", "latest", "step-5.c0de-1.partial"]
)
def test_names_that_no_checkpoint_has_lead_nowhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointUnreadable):
        checkpoint_folder(tmp_path, "job", name)
    with pytest.raises(CheckpointUnwritable):
        partial_folder(tmp_path, "job", name)


# --- whether all see the same directory ----------------------------------------------------------


def test_a_shard_sees_the_directory_that_the_coordinator_has_claimed(tmp_path: Path) -> None:
    before, directory = CheckpointDirectory(tmp_path / "c"), CheckpointDirectory(tmp_path / "c")
    before.claim()
    directory.claim()
    check_seen(tmp_path / "c", directory.mark)
    with pytest.raises(CheckpointUnreadable, match="is not the directory"):
        check_seen(tmp_path / "c", before.mark)
    directory.release()
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize("mark", ["", "..", ".cluster-", "../c/.cluster-" + "0" * 32])
def test_a_shard_without_the_file_system_says_so(tmp_path: Path, mark: str) -> None:
    with pytest.raises(CheckpointUnreadable, match="is not the directory") as found:
        check_seen(tmp_path, mark)
    assert "Mount" in found.value.remedy


def test_a_directory_that_cannot_be_made_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("")
    with pytest.raises(CheckpointUnwritable, match="occupied"):
        CheckpointDirectory(tmp_path / "occupied").claim()


def test_a_directory_that_nothing_can_be_written_to_is_told_at_the_start() -> None:
    """No one may make a file in /proc, root neither."""
    with pytest.raises(CheckpointUnwritable, match="/proc"):
        CheckpointDirectory(Path("/proc")).claim()


def test_a_coordinator_keeps_checkpoints_without_torch() -> None:
    script = "import sys, adashard_server.storage.checkpoints; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
