"""Fail points: nothing at all when off; when armed, a fault happens once, in one process."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from adashard import failpoints
from adashard.failpoints import POINTS, VARIABLE, Action, Fault, Kind, Trigger
from adashard.wire import control
from adashard.wire.errors import ShardUnavailable

SOURCES = [Path(__file__).parents[2] / side / "src" for side in ("client", "server")]
PASSES = "from adashard import failpoints; failpoints.reach('commit'); print('lives')"


def at(kind: Kind) -> str:
    """A point of this kind."""
    return next(name for name, point in POINTS.items() if point.kind is kind)


@pytest.fixture
def armed(tmp_path, monkeypatch):
    """Arms faults for this process."""
    monkeypatch.setattr(failpoints, "_trigger", Trigger(tmp_path))
    names = iter("abcdefgh")

    def arm(*faults):
        return [fault.arm(tmp_path, next(names)) for fault in faults]

    return arm


# --- the table ----------------------------------------------------------------------------------


def calls_in_the_code() -> Counter[tuple[str, str]]:
    """Every call that names a point, as (point, module); those of messages, as in the table."""
    found = Counter[tuple[str, str]]()
    for source in SOURCES:
        for path in source.rglob("*.py"):
            module = str(path.relative_to(source))
            nodes = ast.walk(ast.parse(path.read_text()))
            calls = [node for node in nodes if isinstance(node, ast.Call)]
            found.update((point, module) for call in calls if (point := named(call)))
    return found


def named(call: ast.Call) -> str:
    """The point that a call names; empty if it names none."""
    match call.func:
        case ast.Attribute(value=ast.Name(id="failpoints"), attr="sent" | "received" as way):
            return f"*.{way}"
        case ast.Attribute(value=ast.Name(id="failpoints")):
            return str(ast.literal_eval(call.args[0]))
        case _:
            return ""


def test_every_point_is_named_once_in_the_module_that_the_table_says_and_no_other_is():
    messages = {kind.__name__.lower() for kind in vars(control).values() if isinstance(kind, type)}
    wanted = set()
    for name, point in POINTS.items():
        message, _, way = name.partition(".")
        wanted.add((f"*.{way}" if message in messages else name, point.module))
    assert calls_in_the_code() == Counter(wanted)


def test_every_role_passes_points_of_its_own():
    assert {role for point in POINTS.values() for role in point.roles} == set(failpoints.Role)


# --- what happens -------------------------------------------------------------------------------


def test_without_the_variable_points_are_off():
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    script = "from adashard import failpoints; print(failpoints._trigger)"
    told = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout == "None\n"


def test_a_fault_kills_one_process_and_the_next_one_in_its_place_lives(tmp_path):
    fault = Fault(point="commit", action=Action.KILL).arm(tmp_path, "once")
    assert fault.happened_s is None
    environment = {**os.environ, VARIABLE: str(tmp_path)}
    first, second = (
        subprocess.run([sys.executable, "-c", PASSES], env=environment, capture_output=True)
        for _ in range(2)
    )
    assert (first.returncode, first.stdout) == (-signal.SIGKILL, b"")
    assert (second.returncode, second.stdout) == (0, b"lives\n")
    assert fault.happened_s is not None


def test_a_fault_waits_for_its_passing_of_its_own_point(armed):
    (fault,) = armed(Fault(point="report.sent", action=Action.DROP, passing=3))
    passed = [failpoints.copies("report.sent", 1) for _ in range(2)]
    failpoints.reach("commit")
    assert passed == [(1,), (1,)]
    assert fault.happened_s is None
    assert failpoints.copies("report.sent", 1) == ()
    assert failpoints.copies("report.sent", 1) == (1,)
    assert fault.happened_s is not None


def test_a_fault_is_for_the_processes_that_it_names(armed):
    other, own = armed(
        Fault(point="report.sent", action=Action.DROP, pids=(os.getpid() + 1,)),
        Fault(point="report.sent", action=Action.DUPLICATE, pids=(os.getpid(),)),
    )
    assert failpoints.copies("report.sent", 1) == (1, 1)
    assert failpoints.copies("report.sent", 1) == (1,)
    assert other.happened_s is None
    assert own.happened_s is not None


def test_a_control_message_passes_at_a_point_of_its_own_name(armed):
    armed(
        Fault(point="frozen.sent", action=Action.DROP),
        Fault(point="frozen.received", action=Action.DUPLICATE),
    )
    message = control.Frozen(
        job="job", generation=1, lineage=0, slices=(), versions=(), record=None
    )
    stale = control.Stale(job="job", promised=1)
    assert failpoints.sent(stale) == failpoints.received(stale) == (stale,)
    assert failpoints.sent(message) == ()
    assert failpoints.received(message) == (message, message)


def test_what_is_lost_on_a_stream_is_the_stream(armed):
    point = at(Kind.STREAM)
    armed(Fault(point=point, action=Action.DROP))
    with pytest.raises(ShardUnavailable, match=point):
        failpoints.reach(point)
    failpoints.reach(point)


def test_a_delay_is_a_pause_and_nothing_else(armed, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(failpoints, "sleep", slept.append)
    armed(Fault(point="commit", action=Action.DELAY, delay_s=7.0))
    failpoints.reach("commit")
    assert slept == [7.0]


def test_a_fault_that_is_disarmed_does_not_happen(armed):
    (fault,) = armed(Fault(point="report.sent", action=Action.DROP))
    fault.disarm()
    fault.disarm()
    assert failpoints.copies("report.sent", 1) == (1,)
    assert fault.happened_s is None


@pytest.mark.parametrize(
    ("kind", "action"),
    [(Kind.PLACE, Action.DROP), (Kind.PLACE, Action.DUPLICATE), (Kind.STREAM, Action.DUPLICATE)],
)
def test_what_cannot_happen_at_a_point_is_refused(kind, action):
    with pytest.raises(ValueError, match=f"{action.value} cannot happen at"):
        Fault(point=at(kind), action=action)
