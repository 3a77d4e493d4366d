"""When checkpoints are cut, when one is whole, and what happens when one comes to nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.cluster.scenes import SPEC

from adashard.wire.control import Logged, SnapshotFile, SnapshotRequest, Snapshotted
from adashard.wire.errors import CheckpointUnwritable, StaleGeneration
from adashard.wire.messages import Entry, Lineage, Member, Outcome, Record
from adashard_server.cluster import cutting
from adashard_server.cluster.checkpoints import Checkpoint, Checkpoints, CheckpointSettings
from adashard_server.cluster.cutting import Cuttings
from adashard_server.cluster.instructions import Announce, Commit, Discard, Remove, Tell

SHARDS = ("shard-0", "shard-1")
PLACEMENT = (0, 1, 0)


def entry(generation: int = 3, placement=PLACEMENT, lineage: int = 1) -> Entry:
    return Entry(
        job="job",
        generation=generation,
        author="c/1",
        spec=SPEC,
        workers=(Member(id="w"),),
        shards=tuple(Member(id=shard) for shard in SHARDS),
        placement=placement,
        lineage=Lineage(number=lineage, origin="w"),
        opened=True,
    )


def record(version: int) -> Record:
    return Record(
        step=version,
        workers=("w",),
        shares=(1.0,),
        outcome=Outcome.APPLY,
        present=b"\x07",
        step_counts=(version,) * 3,
        groups=(),
    )


class Scene:
    """A job's cutting, its shards, its disk and its clock, in the test's hand."""

    def __init__(self, entry: Entry | None = None, **settings) -> None:
        self.checkpoints = Checkpoints(CheckpointSettings(**settings), directory="/c", mark="m")
        self.cutting = Cuttings(self.checkpoints, "c0de" * 8)
        self.entry = entry or globals()["entry"]()
        self.version, self.now, self.opened = 0, 0.0, True
        self.said: list[object] = []

    def tick(self, seconds: float = 0.1) -> dict[str, SnapshotRequest]:
        """The requests that are sent, by shard."""
        self.now += seconds
        said = self.cutting.tick(self.entry, opened=self.opened, version=self.version, now=self.now)
        self.said += said
        return {one.member: one.message for one in said if isinstance(one, Tell)}

    def answer(self, shard: str, request: SnapshotRequest, **others) -> None:
        placed = [i for i, owner in enumerate(self.entry.placement) if SHARDS[owner] == shard]
        whole = {
            "files": (SnapshotFile(name=f"{shard}.file", byte_count=10, sha256="0" * 64),),
            "slices": tuple(placed),
            "stall_s": 0.25,
            "record": record(request.version) if request.version else None,
        }
        answer = Snapshotted(
            job="job", generation=request.generation, version=request.version, **(whole | others)
        )
        self.said += self.cutting.snapshotted(shard, answer)

    def fail(self, shard: str, request: SnapshotRequest, error) -> None:
        self.answer(shard, request, files=(), slices=(), record=None, error=error.info())

    def cut(self, requests: dict[str, SnapshotRequest], **others) -> Checkpoint:
        """All shards answer, and the disk takes what they have written."""
        for shard, request in requests.items():
            self.answer(shard, request, **others)
        commit = self.told(Commit)[-1]
        self.said += self.cutting.stored(commit, None)
        return commit.checkpoint

    def told(self, kind) -> list:
        return [one for one in self.said if isinstance(one, kind)]

    def events(self) -> list[str]:
        return [one.name for one in self.told(Announce)]


def test_the_next_multiple_is_asked_for_before_it_is_reached() -> None:
    scene = Scene(every_steps=10)
    requests = scene.tick()
    assert requests.keys() == set(SHARDS)
    assert {(one.generation, one.version) for one in requests.values()} == {(3, 10)}
    scene.version = 12  # they write
    made = scene.cut(requests)
    assert (made.name, made.version, made.generation) == ("step-10", 10, 3)
    assert scene.tick()["shard-0"].version == 20
    assert scene.events() == ["checkpoint"]


def test_shards_without_slices_are_not_asked() -> None:
    assert Scene(entry(placement=(1, 1, 1)), every_steps=10).tick().keys() == {"shard-1"}


def test_without_a_number_of_steps_none_is_cut_by_itself() -> None:
    scene = Scene()
    scene.version = 100
    assert scene.tick() == {}


def test_multiples_that_pass_while_shards_write_are_left_out() -> None:
    scene = Scene(every_steps=2)
    requests = scene.tick()
    scene.version = 7
    scene.cut(requests)
    assert scene.tick()["shard-0"].version == 8


def test_a_request_is_repeated_to_shards_that_have_not_answered() -> None:
    scene = Scene(every_steps=10)
    requests = scene.tick()
    assert scene.tick() == {}
    scene.answer("shard-0", requests["shard-0"])
    assert scene.tick(cutting.REPEAT_S) == {"shard-1": requests["shard-1"]}


@given(st.permutations(range(6)))
@settings(max_examples=60)
def test_it_is_whole_when_all_have_answered_in_any_order_and_however_often(order) -> None:
    scene = Scene(every_steps=10)
    requests = scene.tick()
    for number in order:
        shard = SHARDS[number % 2]
        before = len(scene.told(Commit))
        scene.answer(shard, requests[shard])
        assert len(scene.told(Commit)) - before in (0, 1)
    (commit,) = scene.told(Commit)
    assert commit.placement == PLACEMENT
    assert sorted(file.name for file in commit.files) == ["shard-0.file", "shard-1.file"]
    assert commit.attempt == requests["shard-0"].directory


# --- what voids it -------------------------------------------------------------------------------


def test_a_new_generation_voids_what_is_unfinished() -> None:
    scene = Scene(every_steps=10)
    requests = scene.tick()
    scene.answer("shard-0", requests["shard-0"])
    scene.entry, scene.opened = entry(generation=4), False
    assert scene.tick() == {}
    assert scene.told(Discard) == [Discard("job", requests["shard-0"].directory)]
    scene.answer("shard-1", requests["shard-1"])
    assert scene.told(Commit) == []
    scene.opened = True
    again = scene.tick()
    assert {(one.generation, one.version) for one in again.values()} == {(4, 10)}
    assert again["shard-0"].directory != requests["shard-0"].directory
    scene.answer("shard-0", again["shard-0"])
    scene.answer("shard-1", requests["shard-1"])
    assert scene.told(Commit) == [], "slices of two generations make no checkpoint"


def test_what_is_whole_is_committed_although_the_generation_ends() -> None:
    scene = Scene(every_steps=10)
    for shard, request in scene.tick().items():
        scene.answer(shard, request)
    scene.entry = entry(generation=4)
    assert scene.tick() == {}
    scene.said += scene.cutting.stored(scene.told(Commit)[0], None)
    assert scene.told(Discard) == []
    assert scene.events() == ["checkpoint"]


@pytest.mark.parametrize(
    "others", [{"slices": (0,)}, {"slices": ()}, {"slices": (0, 1, 2)}, {"record": record(9)}]
)
def test_shards_that_have_not_cut_the_same_make_no_checkpoint(others) -> None:
    scene = Scene(every_steps=10)
    requests = scene.tick()
    scene.answer("shard-0", requests["shard-0"], **others)
    scene.answer("shard-1", requests["shard-1"])
    assert scene.told(Commit) == []
    assert scene.events() == ["checkpoint_failed"]


def test_a_version_that_has_passed_is_no_failure_but_tried_later() -> None:
    scene = Scene(every_steps=10)
    scene.fail("shard-0", scene.tick()["shard-0"], StaleGeneration("passed"))
    assert scene.events() == []
    assert scene.tick()["shard-0"].version == 20


def test_a_disk_that_refuses_is_told_once_and_tried_when_the_next_is_due() -> None:
    scene = Scene(every_steps=10)
    requests = scene.tick()
    scene.fail("shard-1", requests["shard-1"], CheckpointUnwritable("x is full", file="x"))
    assert scene.told(Discard) == [Discard("job", requests["shard-1"].directory)]
    (event,) = scene.told(Announce)
    assert (event.name, event.facts["file"], event.facts["version"]) == (
        "checkpoint_failed",
        "x",
        "10",
    )
    assert "x is full" in event.text
    assert scene.tick()["shard-0"].version == 20


def test_a_coordinator_that_cannot_write_the_manifest_tells_it_as_well() -> None:
    scene = Scene(every_steps=10)
    requests = scene.tick()
    for shard, request in requests.items():
        scene.answer(shard, request)
    scene.said += scene.cutting.stored(scene.told(Commit)[0], CheckpointUnwritable("full"))
    assert scene.events() == ["checkpoint_failed"]
    assert scene.told(Discard) == [Discard("job", requests["shard-0"].directory)]
    assert scene.checkpoints.newest("job", None) is None


def test_a_shard_that_never_answers_is_given_up_in_the_end() -> None:
    scene = Scene(every_steps=10)
    scene.answer("shard-0", scene.tick()["shard-0"])
    scene.tick(cutting.WRITE_S_MAX + 1)
    scene.version = 10
    scene.tick()
    assert scene.events() == []
    scene.tick(cutting.WRITE_S_MAX + 1)
    assert "shard-1" in scene.told(Announce)[0].text


def test_a_lineage_that_begins_lower_cuts_its_own_multiples() -> None:
    scene = Scene(every_steps=10)
    scene.version = 55
    scene.cut(scene.tick())
    scene.entry, scene.version = entry(generation=9, lineage=9), 12
    assert scene.tick()["shard-0"].version == 20


# --- asked for -----------------------------------------------------------------------------------


def test_a_job_at_rest_is_cut_as_it_is() -> None:
    scene = Scene()
    scene.version = 7
    scene.cutting.ask("job")
    made = scene.cut(scene.tick())
    assert (made.version, made.kept) == (7, True)
    assert scene.tick() == {}


def test_a_job_that_runs_is_cut_a_little_ahead_and_further_at_each_attempt() -> None:
    scene = Scene()
    scene.cutting.ask("job")
    aheads = []
    for _ in range(5):
        scene.version += 100
        requests = scene.tick()
        aheads.append(requests["shard-0"].version - scene.version)
        scene.fail("shard-1", requests["shard-1"], StaleGeneration("passed"))
    assert aheads == [0, 1, 2, 4, 8]
    assert scene.events() == []


def test_it_goes_before_one_that_is_still_far_ahead() -> None:
    scene = Scene(every_steps=1000)
    far = scene.tick()["shard-0"]
    scene.version = 3
    scene.cutting.ask("job")
    assert scene.cut(scene.tick()).version == 3
    assert scene.told(Discard) == [Discard("job", far.directory)]
    assert scene.tick()["shard-0"].version == 1000


def test_one_that_was_asked_for_is_asked_for_again_in_the_next_generation() -> None:
    scene = Scene()
    scene.version = 7
    scene.cutting.ask("job")
    scene.tick()
    scene.entry, scene.opened = entry(generation=4), False
    scene.tick()
    scene.opened, scene.version = True, 8
    assert scene.tick()["shard-0"].version == 8


def test_one_that_was_asked_for_and_failed_is_not_tried_for_ever() -> None:
    scene = Scene()
    scene.cutting.ask("job")
    scene.fail("shard-0", scene.tick()["shard-0"], CheckpointUnwritable("full"))
    assert scene.events() == ["checkpoint_failed"]
    assert scene.tick() == {}


def test_a_cluster_without_a_directory_says_so() -> None:
    cuttings = Cuttings(Checkpoints(CheckpointSettings(every_steps=1)), "c0de" * 8)
    assert cuttings.tick(entry(), opened=True, version=1, now=0.0) == []
    with pytest.raises(CheckpointUnwritable, match="no directory"):
        cuttings.ask("job")


# --- what it says of itself ----------------------------------------------------------------------


def log(scene: Scene, step: int, worker: str = "w", **values: float) -> None:
    scene.cutting.logged(worker, Logged(job="job", step=step, values=values))


def test_its_loss_is_the_mean_of_what_was_logged_last_up_to_its_version() -> None:
    scene = Scene(every_steps=10)
    log(scene, 8, loss=100.0)
    requests = scene.tick()
    log(scene, 9, "a", loss=1.0, accuracy=0.5)
    log(scene, 9, "b", loss=2.0)
    log(scene, 11, "a", loss=7.0)
    assert scene.cut(requests).loss == 1.5
    assert scene.told(Commit)[0].values == {"loss": 1.5, "accuracy": 0.5}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_loss_and_named(loss: float) -> None:
    scene = Scene(every_steps=10)
    log(scene, 1, loss=loss)
    made = scene.cut(scene.tick())
    assert (made.loss, made.finite) == (None, False)
    assert scene.told(Commit)[0].not_finite == ("loss",)


def test_weights_that_are_not_finite_are_named() -> None:
    scene = Scene(every_steps=10)
    requests = scene.tick()
    scene.answer("shard-0", requests["shard-0"], not_finite=(0, 2))
    scene.answer("shard-1", requests["shard-1"])
    (commit,) = scene.told(Commit)
    assert commit.not_finite == ("parameter-0", "parameter-2")
    assert not commit.checkpoint.finite


def test_the_stall_that_is_told_is_that_of_the_slowest_shard() -> None:
    scene = Scene(every_steps=10)
    requests = scene.tick()
    scene.answer("shard-0", requests["shard-0"], stall_s=0.75)
    scene.cut({"shard-1": requests["shard-1"]})
    (event,) = scene.told(Announce)
    assert event.facts["stall_s"] == "0.750000"
    assert event.facts["bytes"] == "20"


def test_the_record_goes_without_its_partials() -> None:
    scene = Scene(every_steps=10)
    made = scene.cut(scene.tick())
    assert made.record == replace(record(10), partials=())


def test_old_ones_are_removed_when_a_new_one_is_complete() -> None:
    scene = Scene(every_steps=1, keep_last=2, keep_best=0)
    for version in range(4):
        scene.version = version
        scene.cut(scene.tick())
    assert scene.told(Remove) == [Remove("job", "step-1"), Remove("job", "step-2")]
