"""Whole clusters of the project's own state machines, in virtual time, with faults.

Workers join, leave and are killed at any event; streams break and come back; reports and answers
of the registry are lost, doubled and late. After every event the promises of docs/protocol.md are
checked, and once faults stop every live worker goes on. A failing seed fails again: the test of
its number alone replays it, and shows what happened last.
"""

from __future__ import annotations

import pytest
from tests.sim.cluster import Cluster
from tests.sim.history import Violation

LINES = 60


def run(seed: int) -> Cluster:
    cluster = Cluster(seed)
    try:
        cluster.run()
    except Violation as violation:
        violation.add_note(story(seed))
        raise
    return cluster


def story(seed: int) -> str:
    """The last lines of what happened, from a second run with the same seed."""
    again = Cluster(seed, traced=True)
    with pytest.raises(Violation):
        again.run()
    assert again.lines is not None
    return "\n".join(line[:300] for line in again.lines[-LINES:])


@pytest.mark.parametrize("seed", range(100))
def test_every_step_is_taken_once_by_all_or_by_none_and_everybody_goes_on(seed: int):
    run(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(30))
def test_the_same_holds_for_thousands_of_seeds(block: int):
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        run(seed)


def test_a_seed_replays():
    first, second = Cluster(7, traced=True), Cluster(7, traced=True)
    first.run()
    second.run()
    assert first.lines == second.lines
    assert first.lines
    assert first.loop.events == second.loop.events
