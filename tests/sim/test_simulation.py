"""Whole clusters of the project's own state machines, in virtual time, with faults.

Processes of every role are killed, paused and cut off at any event, come back and join; streams
break and are mended; reports and answers of the registry are lost, doubled and late. After every
event the promises of docs/protocol.md are checked, and once faults stop every live worker goes on.
A failing seed fails again: the test of its number alone replays it, and tells the shortest script
of faults with which it fails, and what happened last.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
from tests.sim.cluster import Cluster
from tests.sim.faults import FAMILIES, Fault
from tests.sim.shrinking import run, shortest

SEEDS = 1000
BLOCK = 50

WINDOWS = {
    "a checkpoint is complete",
    "a coordinator steps down",
    "a decided step is finished from pushes",
    "a generation is made while the one before freezes",
    "a generation is made while the one before is repaired",
    "a job is restored",
    "a leaver is let go",
    "a member is revived",
    "a rebuild has two versions at once",
    "a shard is told that it was left out",
    "a slice is rebuilt from a worker",
    "a step is known from workers only",
    "all shards are empty at once",
    "an undecided step has full sums",
    "frozen in the middle of a commit",
    "full sums kept by a shard finish a decided step",
}
"""Moments that the rules are about; a simulator that never comes there shows nothing."""


class Found(NamedTuple):
    """What all seeds together have come to."""

    families: Counter[str]
    windows: Counter[str]


@pytest.fixture(scope="module")
def found() -> Found:
    return Found(Counter(), Counter())


@pytest.mark.parametrize("block", range(SEEDS // BLOCK))
def test_every_step_is_taken_once_by_all_or_by_none_and_everybody_goes_on(block: int, found: Found):
    for seed in range(BLOCK * block, BLOCK * (block + 1)):
        cluster = run(seed)
        found.windows.update(cluster.windows)
        found.families[cluster.family] += 1


def test_these_seeds_come_through_every_family_and_every_window(found: Found):
    if found.families.total() < SEEDS:
        pytest.skip("only some of the seeds were run")
    assert set(found.families) == set(FAMILIES)
    assert set(found.windows) >= WINDOWS


@pytest.mark.slow
@pytest.mark.parametrize("block", range(100))
def test_the_same_holds_for_thousands_of_seeds(block: int):
    for seed in range(SEEDS + 100 * block, SEEDS + 100 * (block + 1)):
        run(seed)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_seed_replays_from_itself_and_from_its_script(family: str):
    first = Cluster(7, family=family, traced=True)
    first.run()
    again = Cluster(7, family=family, traced=True)
    again.run()
    replayed = Cluster(7, family=family, script=tuple(first.faults.done), traced=True)
    replayed.run()
    assert first.lines == again.lines == replayed.lines
    assert first.lines
    assert first.loop.events == again.loop.events


def test_a_script_is_shortened_to_the_faults_that_it_takes():
    script = tuple(Fault(float(number), "kill", f"worker-{number:03}") for number in range(40))
    needed = {script[3], script[17], script[31]}
    assert set(shortest(lambda part: needed <= set(part), script)) == needed
    assert shortest(lambda _: True, script) == ()


def test_no_more_runs_are_tried_than_allowed():
    tried = list[int]()

    def fails(part: tuple[Fault, ...]) -> bool:
        tried.append(len(part))
        return False

    shortest(fails, tuple(Fault(float(number), "kill") for number in range(64)), tries=20)
    assert len(tried) == 20
