"""A member that dies is left out; one that leaves stays until nobody needs it (C2, C8)."""

from __future__ import annotations

import pytest
from tests.cluster.scenes import Scene, announced, told

from adashard.wire.control import Bye, Open
from adashard.wire.errors import from_info
from adashard.wire.messages import Member
from adashard_server.cluster.instructions import HangUp, Swap
from adashard_server.cluster.membership import Phase


def test_a_dead_worker_is_left_out_of_the_next_generation():
    scene = Scene.opened("w0", "w1")
    scene.dead = frozenset({"w0"})
    scene.make_generation()
    assert scene.workers() == {"w1": 1}
    assert scene.entry.next_rank == 2


def test_a_renewal_before_the_next_generation_revives_a_member():
    scene = Scene.opened("w0", "w1", given_up=frozenset())
    scene.dead = frozenset({"w0", "shard-0"})
    scene.tick()  # waits for the shard
    scene.dead = frozenset()
    assert [one for one in scene.tick() if isinstance(one, Swap)] == []
    assert scene.phase is Phase.OPEN


@pytest.mark.parametrize("answered", [False, True])
def test_a_death_while_a_generation_is_made_makes_another_one(answered: bool):
    scene = Scene.opened("w0", "w1")
    scene.membership.join("w2")
    scene.swap()
    scene.written()
    if answered:
        scene.freeze()
    scene.dead = frozenset({"w1"})
    scene.make_generation()
    assert (scene.entry.generation, scene.workers()) == (3, {"w0": 0, "w2": 2})


def test_the_last_worker_may_die_and_the_job_stays():
    scene = Scene.opened("w0")
    scene.base = 7
    scene.dead = frozenset({"w0"})
    scene.make_generation()
    assert scene.workers() == {}
    scene.membership.join("w1")
    opens = told(scene.make_generation(), Open)
    assert opens["w1"].plan.base == 7


def test_who_was_left_out_is_told_that_it_is_no_longer_part():
    scene = Scene.opened("w0", "w1")
    scene.dead = frozenset({"w1"})
    scene.make_generation()
    scene.dead = frozenset()
    bye = told(scene.renew("w1", generation=1), Bye)["w1"]
    assert bye.generation == 2
    assert bye.error is not None
    assert from_info(bye.error).reason == "LeaseExpired"


def test_a_shard_that_is_not_of_the_job_may_renew_and_joins_nothing():
    scene = Scene.opened("w0")
    assert scene.renew("shard-0") == []
    assert scene.renew("w-new", generation=0) == []


def test_a_leaver_is_part_of_the_next_generation_and_not_of_its_rounds():
    scene = Scene.opened("w0", "w1")
    scene.renew("w0", leaving=True)
    scene.renew("w0", leaving=True)
    scene.make_generation()
    assert scene.entry.workers == (
        Member(id="w0", rank=0, leaving=True),
        Member(id="w1", rank=1),
    )
    assert [one for one in scene.tick() if isinstance(one, Swap)] == []


def test_a_leaver_is_let_go_only_when_the_others_have_its_version():
    scene = Scene.opened("w0", "w1", "w2")
    scene.renew("w0", version=5, leaving=True)
    scene.renew("w1", version=5)
    scene.renew("w2", version=4)
    scene.make_generation()
    assert told(scene.tick(), Bye) == {}
    scene.renew("w2", version=5)
    said = scene.tick()
    assert told(said, Bye) == {"w0": Bye(job="job", generation=2)}
    assert HangUp("w0") in said
    assert announced(said) == ["left"]
    assert told(scene.tick(), Bye) == {}


def test_a_leaver_is_not_let_go_while_a_member_is_dead():
    scene = Scene.opened("w0", "w1")
    scene.renew("w0", leaving=True)
    scene.make_generation()
    scene.dead = frozenset({"shard-0"})
    assert told(scene.tick(), Bye) == {}


def test_the_last_one_to_leave_need_not_wait_for_anybody():
    scene = Scene.opened("w0")
    scene.renew("w0", version=5, leaving=True)
    scene.make_generation()
    assert "w0" in told(scene.tick(), Bye)


def test_whoever_was_let_go_is_no_member_and_its_silence_changes_nothing():
    scene = Scene.opened("w0", "w1")
    scene.renew("w0", leaving=True)
    scene.renew("w1")
    scene.make_generation()
    scene.tick()
    assert scene.membership.worker_ids() == {"w1"}
    scene.dead = frozenset({"w0"})
    assert [one for one in scene.tick() if isinstance(one, Swap)] == []
    scene.membership.ask_for_change()
    scene.make_generation()
    assert scene.workers() == {"w1": 1}


def test_a_leaver_does_not_count_for_the_first_step():
    scene = Scene.begin("w0", "w1", silent={"w0", "w1"})
    scene.swap()
    scene.written()
    scene.renew("w0", leaving=True)
    scene.dead = frozenset({"w1"})
    scene.swap()
    scene.written()
    assert [worker.leaving for worker in scene.entry.workers] == [True]
