"""Members that die take no state with them: shards are followed, and filled from what is left."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.cluster.scenes import SPEC, Scene, announced, told

from adashard.wire.control import Bye, Notice, Open, PlanRequest
from adashard.wire.errors import from_info
from adashard.wire.messages import Lineage, Record
from adashard_server.cluster.instructions import Announce
from adashard_server.cluster.membership import Phase

# --- shards --------------------------------------------------------------------------------------


def test_a_silent_shard_is_waited_for_and_everybody_hears_why():
    scene = Scene.opened("w0")
    scene.dead = frozenset({"shard-0"})
    said = scene.tick()
    assert "shard-0 is gone" in told(said, Notice)["w0"].text
    assert announced(said) == ["waiting"]
    assert scene.phase is Phase.OPEN


def test_a_job_whose_shard_is_gone_is_lost_and_says_so_to_every_worker():
    scene = Scene.opened("w0", "w1")
    scene.membership.join("w2")
    scene.dead = scene.given_up = frozenset({"shard-0"})
    scene.swap()
    scene.written()
    said = scene.freeze()
    assert scene.phase is Phase.LOST
    assert announced(said) == ["lost"]
    byes = told(said, Bye)
    assert byes.keys() == {"w0", "w1", "w2"}
    for bye in byes.values():
        assert bye.error is not None
        assert from_info(bye.error).reason == "JobLost"
    assert "parameter-0" in scene.membership.reason
    assert scene.tick(100.0) == []


def test_a_job_all_of_whose_shards_are_gone_waits_for_one_to_come():
    scene = Scene.opened("w0")
    scene.dead = scene.given_up = frozenset({"shard-0", "shard-1"})
    assert "all shards" in told(scene.tick(), Notice)["w0"].text
    scene.shards = ("shard-2",)
    scene.holds["w0"] = (0, 1, 2)
    scene.make_generation()
    assert [shard.id for shard in scene.entry.shards] == ["shard-2"]
    assert scene.entry.placement == (0, 0, 0)


def test_a_fresh_shard_takes_the_place_of_a_dead_one_at_once_and_is_filled_by_a_worker():
    scene = Scene.opened("w0")
    scene.holds["w0"] = (0, 1, 2)
    before = scene.entry.placement
    scene.dead = frozenset({"shard-0"})
    assert announced(scene.tick()) == ["waiting"]
    scene.shards = ("shard-1", "shard-9")
    scene.swap()
    scene.written()
    plans = told(scene.freeze(), PlanRequest)
    assert [shard.id for shard in scene.entry.shards] == ["shard-9", "shard-1"]
    assert scene.entry.placement == before
    sources = plans["w0"].plan.sources
    assert {source.slice for source in sources} == {n for n, o in enumerate(before) if o == 0}
    assert {source.member for source in sources} == {"w0"}


def test_it_is_told_who_has_died_and_what_was_rebuilt_from_whom():
    scene = Scene.opened("w0", "w1")
    scene.holds["w0"] = (0, 1, 2)
    scene.dead, scene.shards = frozenset({"shard-0", "w1"}), ("shard-1", "shard-9")
    died = [one for one in scene.tick() if isinstance(one, Announce)]
    assert [(one.name, one.facts) for one in died] == [
        ("died", {"worker": "w1"}),
        ("died", {"shard": "shard-0"}),
    ]
    assert died[0].text == "worker w1 (rank 1) is gone"
    scene.written()
    lost = scene.entry.placement.count(0)
    plans = told(scene.freeze(), PlanRequest)
    assert len(plans["w0"].plan.sources) == lost
    said = [one for one in scene.planned() if isinstance(one, Announce)]
    assert [one.name for one in said] == ["rebuilt", "open"]
    assert said[0].text == f"{lost} slices are rebuilt from the memory of worker w0"


def test_the_first_weights_of_a_job_are_not_told_as_rebuilt():
    scene = Scene.begin("w0")
    assert "rebuilt" not in announced(scene.make_generation())


def test_survivors_take_the_slices_of_a_shard_that_is_not_waited_for_any_longer():
    scene = Scene.opened("w0")
    scene.holds["w0"] = (0, 1, 2)
    scene.dead = scene.given_up = frozenset({"shard-0"})
    scene.make_generation()
    assert [shard.id for shard in scene.entry.shards] == ["shard-1"]
    assert scene.entry.placement == (0, 0, 0)


def test_a_worker_that_is_merely_silent_is_not_left_out_while_it_alone_holds_a_dead_shards_state():
    scene = Scene.opened("w0", "w1")
    scene.renew("w0")
    scene.renew("w1")
    scene.holds["w0"] = scene.holds["w1"] = (0, 1, 2)
    scene.shards = ("shard-1", "shard-9")
    scene.dead, scene.quiet = frozenset({"shard-0", "w0", "w1"}), frozenset({"w1"})
    said = scene.tick()
    assert "worker w1 is silent" in told(said, Notice)["w1"].text
    scene.dead = frozenset({"shard-0", "w0"})
    scene.make_generation()
    assert scene.workers() == {"w1": 1}


def test_a_silent_worker_is_left_out_where_another_holds_the_same_or_no_shard_has_died():
    for dead, holders in (({"shard-0", "w1"}, 2), ({"w1"}, 1)):
        scene = Scene.opened("w0", "w1")
        for worker in ("w0", "w1")[-holders:]:
            scene.renew(worker)
            scene.holds[worker] = (0, 1, 2)
        scene.shards = ("shard-0", "shard-1", "shard-9")
        scene.dead, scene.quiet = frozenset(dead), frozenset({"w1"})
        scene.make_generation()
        assert scene.workers() == {"w0": 0}


def test_a_copy_that_turns_out_to_be_changed_makes_the_plan_void():
    scene = Scene.opened("w0", "w1")
    scene.dead, scene.shards = frozenset({"shard-0"}), ("shard-1", "shard-9")
    scene.holds["w0"] = scene.holds["w1"] = (0, 1, 2)
    scene.swap()
    scene.written()
    plans = told(scene.freeze(), PlanRequest)
    assert {source.member for source in plans["w0"].plan.sources} == {"w0"}
    scene.holds["w0"] = (1, 2)
    scene.freeze("w0")
    scene.swap()
    scene.written()
    sources = told(scene.freeze(), PlanRequest)["w1"].plan.sources
    assert "w1" in {source.member for source in sources if source.slice == 0}


def test_a_job_begins_anew_with_whoever_is_there_then():
    scene = Scene.opened("w0")
    scene.dead = scene.given_up = frozenset({"shard-0", "shard-1", "w0"})
    scene.tick()
    scene.shards = ("shard-2",)
    scene.swap()
    scene.written()
    assert announced(scene.freeze()) == ["lost"]
    scene.membership.restart(replace(SPEC, min_workers=1))
    scene.membership.join("w1")
    scene.base = 0
    scene.make_generation()
    assert scene.entry.lineage == Lineage(number=3, origin="w1")
    assert [shard.id for shard in scene.entry.shards] == ["shard-2"]
    assert scene.workers() == {"w1": 1}


# --- state that is gone --------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    name: str = "step-7"
    version: int = 7
    record: Record | None = None


class Archive:
    """Holds one checkpoint, or none."""

    def __init__(self, found: Found | None) -> None:
        self.found = found

    def newest(self, job: str, lineage: Lineage) -> Found | None:
        return self.found

    def named(self, job: str, name: str) -> Found | None:
        return self.found if self.found and self.found.name == name else None


def test_where_state_is_gone_the_job_goes_on_from_its_newest_checkpoint_and_says_so():
    scene = Scene.opened("w0")
    scene.membership.archive = Archive(Found())
    scene.dead = scene.given_up = frozenset({"shard-0"})
    scene.swap()
    scene.written()
    assert announced(scene.freeze()) == ["restored"]
    said = scene.make_generation()
    assert scene.entry.lineage == Lineage(number=3, origin="", base_version=7, checkpoint="step-7")
    plan = told(said, Open)["w0"].plan
    assert plan.base == 7
    assert {(source.member, source.version) for source in plan.sources} == {("", 7)}
    assert scene.entry.opened


def test_a_job_that_is_resumed_begins_from_its_checkpoint():
    scene = Scene.begin("w0")
    scene.membership.stored = Found()
    scene.make_generation()
    assert scene.entry.lineage == Lineage(number=1, origin="", base_version=7, checkpoint="step-7")


def test_a_checkpoint_that_cannot_be_read_is_followed_by_the_next_or_the_job_is_lost():
    scene = Scene.opened("w0")
    scene.membership.archive = archive = Archive(Found())
    scene.membership.restore("slice 0 is gone")
    scene.swap()
    scene.written()
    archive.found = Found("step-5", 5)
    assert announced(scene.membership.restore("step-7 is damaged")) == ["restored"]
    scene.make_generation()
    assert scene.entry.lineage is not None
    assert scene.entry.lineage.checkpoint == "step-5"
    archive.found = None
    assert announced(scene.membership.restore("step-5 is damaged")) == ["lost"]
