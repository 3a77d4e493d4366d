"""A coordinator's directory of checkpoints: what it begins with, and what is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.storage.stored import SPEC, filled, record_of, stored

from adashard.wire.control import SnapshotFile
from adashard.wire.errors import (
    AdashardError,
    CheckpointUnreadable,
    CheckpointUnwritable,
    InvalidSettings,
)
from adashard.wire.messages import Lineage
from adashard_server.app.checkpoints import CheckpointKeeper
from adashard_server.cluster.checkpoints import Checkpoint, Checkpoints
from adashard_server.cluster.cutting import COMPLETED, FAILED, KEPT, Cuttings
from adashard_server.cluster.instructions import Announce, Commit, Discard, Remove
from adashard_server.config import CoordinatorSettings
from adashard_server.storage.checkpoints import partial_folder


def keeper(directory: Path | str, resume: str = "") -> CheckpointKeeper:
    return CheckpointKeeper(CoordinatorSettings(checkpoint_dir=str(directory), resume=resume))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    held = filled(SPEC)
    stored(tmp_path, held, version=5, values={"loss": 2.5}, kept=True)
    stored(tmp_path, held, version=10, not_finite=("loss",))
    damaged = stored(tmp_path, held, version=15)
    (damaged / "manifest.json").write_text("{")
    return tmp_path


def test_it_begins_with_what_is_in_the_directory(directory: Path) -> None:
    found = keeper(directory).checkpoints
    five, ten = sorted(found.of("job"), key=lambda one: one.version)
    assert (five.name, five.loss, five.finite, five.kept) == ("step-5", 2.5, True, True)
    assert (five.record, five.spec) == (record_of(5, SPEC), SPEC)
    assert (ten.finite, ten.generation, ten.lineage.number) == (False, 3, 1)
    assert found.free_name("job", 15) == "step-15.2", "damaged ones are not written over"
    assert found.resumable("job") is None


def test_the_newest_that_is_finite_is_resumed(directory: Path) -> None:
    stored_one = keeper(directory, "latest").checkpoints.resumable("job")
    assert stored_one is not None
    assert stored_one.name == "step-5"


def test_the_one_that_is_named_is_resumed_be_it_finite_or_not(directory: Path) -> None:
    for options in ({"directory": directory}, {"directory": ""}):
        made = keeper(options["directory"], str(directory / "job" / "step-10")).checkpoints
        assert made.directory == str(directory)
        one = made.resumable("job")
        assert one is not None
        assert one.name == "step-10"
        assert made.resumable("another") is None


def test_one_that_is_not_in_the_directory_is_refused(directory: Path, tmp_path: Path) -> None:
    folder = directory / "job" / "step-5"
    with pytest.raises(InvalidSettings, match=r"its place is .*/elsewhere/job/step-5"):
        keeper(tmp_path / "elsewhere", str(folder))
    folder.rename(tmp_path / "step-5")
    with pytest.raises(InvalidSettings, match="not in the directory"):
        keeper("", str(tmp_path / "step-5"))


def test_nothing_can_be_resumed_from_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="--checkpoint-dir"):
        keeper("", "latest")
    with pytest.raises(CheckpointUnreadable, match="never completed"):
        keeper(tmp_path, str(tmp_path / "job" / "step-1"))
    (tmp_path / "occupied").write_text("")
    with pytest.raises(CheckpointUnwritable, match="occupied"):
        keeper(tmp_path / "occupied")


def test_without_a_directory_there_is_nothing(tmp_path: Path) -> None:
    made = keeper("")
    assert made.checkpoints.directory == ""
    with pytest.raises(CheckpointUnwritable):
        made.carry_out(Discard("job", "step-1.c0de-1"))
    made.close()


def test_what_is_decided_is_done(directory: Path) -> None:
    made = keeper(directory)
    attempt = "step-7.c0de-1"
    folder = partial_folder(directory, "job", attempt)
    folder.mkdir()
    file = folder / "shard-0-state.safetensors"
    file.write_bytes(b"abc")
    commit = Commit(
        checkpoint=Checkpoint(
            job="job",
            name="step-7",
            version=7,
            generation=2,
            lineage=Lineage(number=1, origin="w"),
            spec=SPEC,
            record=record_of(7, SPEC),
        ),
        attempt=attempt,
        placement=(0,) * len(filled(SPEC)),
        files=(SnapshotFile(name=file.name, byte_count=3, sha256="0" * 64),),
        values={"loss": 1.5},
        not_finite=("accuracy",),
    )
    made.carry_out(commit)
    made.carry_out(Remove("job", "step-5"))
    found = keeper(directory).checkpoints
    assert found.named("job", "step-5") is None
    again = found.named("job", "step-7")
    assert again is not None
    assert (again.loss, again.finite) == (1.5, False)
    folder.mkdir()
    made.carry_out(Discard("job", attempt))
    assert not folder.exists()
    made.close()


# --- asked for -----------------------------------------------------------------------------------


def asked(directory: Path, *events: Announce) -> object:
    """What a person who asks for a checkpoint is answered, once these events have come."""
    made = keeper(directory)
    cuttings = Cuttings(made.checkpoints, "c0de")

    async def ask() -> object:
        for event in events:  # in this loop, so not before it waits
            asyncio.get_running_loop().call_soon(made.announced, event)
        return await made.create(cuttings, "job")

    return asyncio.run(ask())


def test_who_asks_is_answered_when_the_one_asked_for_is_there(tmp_path: Path) -> None:
    other = Announce("job", COMPLETED, "", {KEPT: "False"})
    elsewhere = Announce("another", COMPLETED, "", {KEPT: "True"})
    mine = Announce("job", COMPLETED, "", {KEPT: "True", "checkpoint": "step-3"})
    facts = asked(tmp_path, other, elsewhere, Announce("job", "open", ""), mine, mine)
    assert facts == mine.facts


def test_who_asks_is_told_why_there_is_none(tmp_path: Path) -> None:
    facts = {KEPT: "True", "reason": "CheckpointUnwritable", "remedy": "Make room.", "file": "x"}
    with pytest.raises(CheckpointUnwritable, match="full") as found:
        asked(tmp_path, Announce("job", FAILED, "no checkpoint: x is full", facts))
    assert found.value.remedy == "Make room."
    assert found.value.facts["file"] == "x"


def test_a_cluster_without_a_directory_cannot_be_asked() -> None:
    with pytest.raises(AdashardError, match="no directory"):
        asyncio.run(keeper("").create(Cuttings(Checkpoints(), "c0de"), "job"))


def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adashard_server.app.checkpoints.ASKED_S_MAX", 0.0)
    with pytest.raises(AdashardError, match="is not there after 0 s"):
        asked(tmp_path)
