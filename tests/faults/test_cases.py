"""The table of faults leaves none out, and its results are counted as it says."""

from __future__ import annotations

import pytest
from benchmarks.disturbed.cases import Outcome, Step, all_cases

from adashard.failpoints import POINTS, Action, Role


def outcome(*ended_s: float, workers: tuple[int, ...] = (), happened_s: float = 0.0) -> Outcome:
    counts = workers or (2,) * len(ended_s)
    steps = enumerate(zip(ended_s, counts, strict=True), start=1)
    return Outcome(
        digests={},
        steps=tuple(Step(step=step, ended_s=end, workers=n) for step, (end, n) in steps),
        happened_s=happened_s,
    )


def test_every_action_at_every_point_by_every_role_is_a_case():
    cases = list(all_cases())
    played = {(one.fault.point, one.role, one.fault.action) for one in cases if one.fault}
    assert played == {
        (name, role, action)
        for name, point in POINTS.items()
        for role in point.roles
        for action in point.kind.value
    }
    assert len(set(map(str, cases))) == len(cases)


def test_each_role_is_killed_from_outside_and_all_servers_are_at_once():
    outside = [set(case.killed) for case in all_cases() if case.fault is None]
    assert {"coordinator"} in outside
    assert {"coordinator", "shard-0", "shard-1"} in outside


def test_only_the_kill_of_a_worker_may_lose_one():
    losing = [case for case in all_cases() if case.loses_a_worker]
    assert losing
    assert all(
        case.role is Role.WORKER and case.fault and case.fault.action is Action.KILL
        for case in losing
    )


@pytest.mark.parametrize(
    ("ended_s", "happened_s", "recovery_s"),
    [
        ((10.0, 11.0, 12.0), 12.5, 0.0),  # all steps had ended
        ((10.0, 11.0, 16.0, 16.5), 11.5, 4.5),  # counted from the fault, not from the step before
        ((10.0, 11.0, 11.6, 15.0, 15.1), 11.5, 3.4),  # the step after the next had to wait
    ],
)
def test_recovery_is_the_longest_step_since_the_fault(ended_s, happened_s, recovery_s):
    assert outcome(*ended_s, happened_s=happened_s).recovery_s == pytest.approx(recovery_s)


def test_a_worker_has_been_in_all_steps_up_to_the_last_with_both():
    assert outcome(1.0, 2.0, 3.0, 4.0, workers=(2, 2, 1, 1)).last_together == 2
