"""One procedure for every change: compare and set, freeze, plan, open (rules G and C)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cluster.scenes import SPEC, Scene, announced, told

from adashard.wire.control import (
    Bye,
    Freeze,
    Frozen,
    Notice,
    Open,
    Opened,
    Planned,
    PlanRequest,
    Standing,
)
from adashard.wire.messages import Entry, Lineage
from adashard_server.cluster.instructions import HangUp, StepDown, Swap
from adashard_server.cluster.membership import REPEAT_S, Membership, Phase
from adashard_server.cluster.registry import ABSENT

# --- the procedure -------------------------------------------------------------------------------


def test_a_generation_is_written_frozen_planned_marked_and_opened():
    scene = Scene.begin("w0", "w1")
    swap = scene.swap()
    assert (swap.expected, swap.entry.generation) == ((0, ""), 1)
    assert [worker.id for worker in swap.entry.workers] == ["w0", "w1"]
    everybody = {"w0", "w1", "shard-0", "shard-1"}
    assert told(scene.written(), Freeze).keys() == everybody
    assert told(scene.freeze(), PlanRequest).keys() == everybody
    (mark,) = scene.planned()
    assert isinstance(mark, Swap)
    assert mark.expected == (1, swap.entry.author)
    assert mark.entry.opened
    opens = told(scene.written(), Open)
    assert opens.keys() == everybody
    assert {one.plan.entry.opened for one in opens.values()} == {True}


def test_every_write_of_a_coordinator_has_an_author_of_its_own():
    scene = Scene.begin("w0")
    first = scene.swap()
    scene.written()
    scene.freeze()
    (mark,) = scene.planned()
    assert isinstance(mark, Swap)
    assert first.entry.author != mark.entry.author


def test_a_lineage_is_marked_as_opened_once():
    scene = Scene.opened("w0")
    scene.membership.join("w1")
    scene.swap()
    scene.written()
    scene.freeze()
    opens = told(scene.planned(), Open)
    assert opens.keys() == {"w0", "w1", "shard-0", "shard-1"}
    assert scene.phase is Phase.OPEN


def test_nobody_is_frozen_before_the_registry_has_the_generation():
    scene = Scene.begin("w0")
    scene.swap()
    assert scene.tick() == []
    assert scene.phase is Phase.SWAPPING


def test_no_plan_is_made_before_the_last_member_has_answered():
    scene = Scene.begin("w0", "w1", silent={"w1"})
    scene.swap()
    scene.written()
    assert scene.freeze() == []
    scene.silent.clear()
    assert told(scene.freeze("w1"), PlanRequest)


def test_nothing_opens_before_every_slice_is_where_it_belongs():
    scene = Scene.begin("w0")
    scene.swap()
    scene.written()
    scene.freeze()
    assert scene.planned("shard-0") == []
    assert scene.phase is Phase.PLANNING
    assert scene.planned("shard-1") != []


def test_a_shard_without_slices_is_not_waited_for():
    scene = Scene.begin("w0", shards=("s0", "s1", "s2", "s3"))
    scene.swap()
    scene.written()
    scene.freeze()
    holders = [scene.entry.shards[owner].id for owner in scene.entry.placement]
    assert len(holders) < 4
    assert scene.planned(*holders) != []


@pytest.mark.parametrize(
    ("phase", "kind"),
    [(Phase.FREEZING, Freeze), (Phase.PLANNING, PlanRequest), (Phase.OPEN, Open)],
)
def test_what_is_not_answered_is_sent_again_to_those_who_are_silent(phase: Phase, kind: type):
    scene = Scene.begin("w0", "w1")
    scene.swap()
    scene.written()
    scene.freeze("w0", "shard-0")
    if phase is not Phase.FREEZING:
        scene.freeze("w1", "shard-1")
        scene.planned("shard-0")
    if phase is Phase.OPEN:
        scene.planned("shard-1")
        scene.written()
        scene.confirm("w0", "shard-0")
    assert scene.phase is phase
    assert told(scene.tick(REPEAT_S / 2), kind) == {}
    silent = {"w1", "shard-1"} | ({"w0"} if phase is Phase.PLANNING else set())
    assert told(scene.tick(REPEAT_S), kind).keys() == silent
    assert told(scene.tick(REPEAT_S / 2), kind) == {}


def test_answers_to_another_generation_or_of_nobody_count_nothing():
    scene = Scene.begin("w0")
    scene.swap()
    scene.written()
    assert scene.membership.frozen("w0", Frozen(job="job", generation=9), 0.0) == []
    assert scene.membership.frozen("stranger", scene.answer("stranger"), 0.0) == []
    assert scene.planned() == []
    scene.confirm()
    scene.freeze()
    assert scene.freeze() == []
    assert scene.membership.planned("shard-0", Planned(job="job", generation=9), 0.0) == []
    scene.planned()
    scene.written()
    scene.membership.opened("w0", Opened(job="job", generation=9))
    assert "w0" in told(scene.tick(REPEAT_S), Open)


# --- who comes -----------------------------------------------------------------------------------


def test_the_first_step_waits_for_enough_workers_and_says_so_once_to_each():
    scene = Scene.begin("w0", min_workers=2)
    said = scene.tick()
    assert announced(said) == ["waiting"]
    assert told(said, Notice)["w0"].text == "the first step needs 2 workers; 1 are there"
    assert scene.tick() == []
    scene.membership.join("w1")
    assert isinstance(scene.tick()[-1], Swap)


def test_the_first_step_waits_for_enough_shards():
    scene = Scene.begin("w0", min_shards=3)
    assert "needs 3 shards; 2 are there" in told(scene.tick(), Notice)["w0"].text
    scene.shards = ()
    assert "no shard is there" in told(scene.tick(), Notice)["w0"].text


def test_a_job_needs_its_first_number_of_workers_only_once():
    scene = Scene.opened("w0", "w1", min_workers=2)
    scene.dead = frozenset({"w1"})
    scene.make_generation()
    assert scene.workers() == {"w0": 0}


def test_the_lineage_names_the_lowest_ranked_worker():
    scene = Scene.begin("w1", "w0")
    assert scene.swap().entry.lineage == Lineage(number=1, origin="w1")


def test_a_joiner_gets_the_next_rank_and_a_placement_that_has_not_moved():
    scene = Scene.opened("w0")
    before = scene.entry
    scene.membership.join("w1")
    scene.membership.join("w1")
    scene.shards = (*scene.shards, "shard-2")
    scene.make_generation()
    assert scene.workers() == {"w0": 0, "w1": 1}
    assert (scene.entry.placement, scene.entry.shards) == (before.placement, before.shards)
    assert scene.entry.lineage == before.lineage


def test_a_worker_that_joins_meanwhile_is_in_the_generation_after():
    scene = Scene.begin("w0")
    scene.swap()
    scene.membership.join("w1")
    scene.written()
    scene.freeze()
    scene.planned()
    scene.written()
    scene.confirm()
    assert scene.workers() == {"w0": 0}
    scene.make_generation()
    assert scene.workers() == {"w0": 0, "w1": 1}


def test_a_joiner_waits_until_a_change_under_way_has_opened():
    scene = Scene.begin("w0")
    scene.swap()
    scene.written()
    scene.membership.join("w1")
    assert [one for one in scene.tick() if isinstance(one, Swap)] == []


def test_a_joiner_that_died_or_left_before_its_generation_is_not_in_it():
    scene = Scene.opened("w0")
    for joiner in ("w1", "w2", "w3"):
        scene.membership.join(joiner)
    scene.dead = frozenset({"w1"})
    said = scene.renew("w2", leaving=True, generation=0)
    assert told(said, Bye)["w2"].error is None
    assert HangUp("w2") in said
    scene.make_generation()
    assert scene.workers() == {"w0": 0, "w3": 1}


@given(st.lists(st.sampled_from(["join", "die", "leave"]), max_size=12))
def test_ranks_are_ascending_and_never_used_again(course: list[str]):
    scene = Scene.opened("w0")
    seen = scene.workers()
    for number, event in enumerate(course, start=1):
        members = [one.id for one in scene.entry.workers if not one.leaving]
        match event:
            case "join":
                scene.membership.join(f"w{number}")
            case "die" if members:
                scene.dead |= {members[-1]}
            case "leave" if members:
                scene.renew(members[0], leaving=True)
            case _:
                continue
        highest, before = max(seen.values()), dict(seen)
        scene.make_generation()
        for worker, rank in scene.workers().items():
            assert seen.setdefault(worker, rank) == rank
            assert worker in before or rank > highest
        assert list(scene.workers().values()) == sorted(scene.workers().values())


# --- a lineage that was never opened -------------------------------------------------------------


def test_a_job_of_a_dead_first_worker_begins_with_another_before_it_was_opened():
    scene = Scene.begin("w0", "w1")
    scene.swap()
    scene.written()
    scene.dead = frozenset({"w0"})
    scene.swap()
    scene.written()
    assert scene.freeze() == []
    assert scene.swap().entry.lineage == Lineage(number=3, origin="w1")
    assert scene.workers() == {"w1": 1}


def test_a_job_whose_only_worker_died_before_it_was_opened_waits_for_another():
    scene = Scene.begin("w0")
    scene.swap()
    scene.written()
    scene.dead = frozenset({"w0"})
    scene.swap()
    scene.written()
    scene.freeze()
    assert announced(scene.tick()) == ["waiting"]
    scene.membership.join("w1")
    scene.make_generation()
    assert scene.entry.lineage == Lineage(number=3, origin="w1")
    assert scene.entry.opened


# --- the registry and other coordinators ---------------------------------------------------------


def test_a_lost_swap_answer_is_recognised_by_its_author():
    scene = Scene.begin("w0")
    swap = scene.swap()
    assert told(scene.written(done=False, stored=swap.entry), Freeze)


def test_a_coordinator_whose_swap_fails_steps_down():
    scene = Scene.begin("w0")
    swap = scene.swap()
    (down,) = scene.written(done=False, stored=replace(swap.entry, author="other/1"))
    assert isinstance(down, StepDown)
    assert "another coordinator" in down.reason


def test_what_a_registry_has_lost_is_written_again_and_said():
    scene = Scene.opened("w0")
    scene.membership.join("w1")
    swap = scene.swap()
    lost, again = scene.written(done=False, stored=None)
    assert announced([lost]) == ["registry_lost"]
    assert again == Swap(swap.entry, ABSENT)
    assert told(scene.written(), Freeze).keys() == {"w0", "w1", "shard-0", "shard-1"}


def test_a_coordinator_that_is_shown_a_higher_generation_steps_down():
    scene = Scene.opened("w0")
    (down,) = scene.renew("w0", generation=2)
    assert isinstance(down, StepDown)


def test_a_generation_that_is_being_written_may_be_promised_before_its_answer_comes():
    scene = Scene.opened("w0")
    scene.membership.join("w1")
    scene.swap()
    assert scene.renew("w0", generation=2) == []


def test_a_job_that_was_never_written_goes_on_above_what_its_members_have_promised():
    scene = Scene.begin("w0")
    scene.membership.renewed("shard-0", Standing(job="job", generation=6, version=3), 0.0)
    swap = scene.swap()
    assert (swap.entry.generation, swap.expected) == (7, (0, ""))


def test_a_coordinator_that_starts_makes_a_new_generation_of_what_it_finds():
    found = Scene.opened("w0", "w1").entry
    scene = Scene(Membership(found, "d"))
    scene.membership.ask_for_change()
    scene.base = 5
    swap = scene.swap()
    assert (swap.expected, swap.entry.generation) == ((1, found.author), 2)
    assert scene.membership.pending() == (*swap.entry.workers, *swap.entry.shards)
    scene.written()
    assert scene.membership.pending() == ()
    assert swap.entry.workers == found.workers


# --- what it knows -------------------------------------------------------------------------------


def test_the_version_is_the_newest_that_a_shard_has_told_of():
    scene = Scene.begin("w0")
    assert scene.membership.version == -1
    scene.make_generation()
    assert scene.membership.version == 0
    scene.renew("shard-1", version=4)
    scene.renew("w0", version=9)
    assert scene.membership.version == 4


def test_entries_keep_the_settings_of_the_job():
    scene = Scene.opened("w0")
    entry: Entry = scene.entry
    assert entry.spec == SPEC
    assert set(entry.placement) == {0, 1}
