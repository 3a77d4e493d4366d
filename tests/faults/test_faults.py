"""A training whose processes are killed, and whose messages get lost, comes to the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from benchmarks.disturbed.cases import Case, all_cases, kill_at
from benchmarks.disturbed.stage import Stage

from adashard.failpoints import Action, Fault, Role
from adashard_server.cluster.leases import LeaseSettings

IN_EVERY_RUN = (
    kill_at("apply", Role.SHARD, passing=2, everywhere=True),  # between two slices of a commit
    Case(
        killed=("shard-1",),
        fault=Fault(point="freeze.sent", action=Action.KILL, passing=2),
        role=Role.COORDINATOR,
    ),
    kill_at("push.frame", Role.WORKER, passing=2),
)

pytestmark = [pytest.mark.processes]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """Leases are short, since a new coordinator waits for one before it gives a member up."""
    with Stage(leases=LeaseSettings(lease_s=6.0), spare=False) as running:
        yield running


def check(stage: Stage, case: Case) -> None:
    outcome = stage.play(case)
    assert set(outcome.digests.values()) == {stage.expected(case, outcome)}


@pytest.mark.parametrize("case", IN_EVERY_RUN, ids=str)
def test_the_most_telling_faults_change_no_bit(stage, case):
    check(stage, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in all_cases() if case not in IN_EVERY_RUN], ids=str
)
def test_no_fault_changes_a_bit(stage, case):
    check(stage, case)
