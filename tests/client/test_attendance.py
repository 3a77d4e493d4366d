"""A member's control stream: it comes back under the same id, and knows when to give up."""

from __future__ import annotations

import queue

import pytest
from tests.client.fakes import WAIT_S, FakeTransport

from adashard import retry
from adashard.transport import attendance as attendance_module
from adashard.transport.attendance import Attendance
from adashard.wire.control import Hello, Logged, Notice, Renewal, Welcome
from adashard.wire.errors import (
    AdashardError,
    CannotReachServer,
    Internal,
    Unauthenticated,
    VersionSkew,
)


class Member:
    """A member that attends over a fake transport, and what it was told."""

    def __init__(self, transport: FakeTransport, budget_s: float = 1e9) -> None:
        self.transport = transport
        self.handled: queue.SimpleQueue = queue.SimpleQueue()
        self.failures: queue.SimpleQueue[AdashardError] = queue.SimpleQueue()
        self.attendance = Attendance(
            transport,
            "nowhere:1",
            hello=lambda: Hello(id="member", version="0", host="h", pid=1),
            renewal=Renewal,
            handle=self._handle,
            failed=self.failures.put,
            connect_budget_s=budget_s,
        )
        self.attendance.start()

    def _handle(self, message) -> None:
        self.handled.put(message)
        if message == Notice(job="", text="break"):
            raise RuntimeError("a defect")

    def handles(self):
        return self.handled.get(timeout=WAIT_S)

    def fails_with(self) -> AdashardError:
        return self.failures.get(timeout=WAIT_S)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(retry, "uniform", lambda low, high: 0.0)


@pytest.fixture
def transport():
    return FakeTransport()


def test_hello_comes_first_then_where_it_stands_then_what_is_sent(transport):
    member = Member(transport)
    control = transport.control()
    assert isinstance(member.handles(), Welcome)
    member.attendance.send(Logged(job="j", step=1))
    assert isinstance(transport.heard.get(timeout=WAIT_S), Hello)
    assert isinstance(transport.heard.get(timeout=WAIT_S), Renewal)
    assert transport.hear(Logged).step == 1
    control.say(Notice(job="j", text="one"))
    control.say(Notice(job="j", text="two"))
    assert [member.handles().text for _ in range(2)] == ["one", "two"]
    member.attendance.close()


def test_it_renews_by_itself_as_often_as_the_coordinator_asks(transport, monkeypatch):
    monkeypatch.setattr(attendance_module, "_RENEW_S", 0.001)
    transport.renew_s = 0.002
    member = Member(transport)
    transport.control()
    for _ in range(4):
        transport.hear(Renewal)
    assert member.attendance._renew_s == 0.002
    member.attendance.close()


@pytest.mark.parametrize("end", [None, CannotReachServer("gone")])
def test_a_stream_that_breaks_is_opened_anew_with_the_same_id(transport, end):
    member = Member(transport)
    for _ in range(4):
        control = transport.control()
        assert transport.hear(Hello).id == "member"
        assert isinstance(member.handles(), Welcome)
        control.say(end)
    transport.control()
    assert member.failures.empty()
    member.attendance.close()


def test_once_welcome_it_never_gives_up(transport):
    member = Member(transport, budget_s=0.0)
    control = transport.control()
    assert isinstance(member.handles(), Welcome)
    member.attendance._closed.wait = lambda timeout: False  # the longest wait, not awaited
    transport.refusals = [CannotReachServer("away")] * 5
    control.say(CannotReachServer("away"))
    transport.control()
    assert member.failures.empty()
    member.attendance.close()


def test_between_two_tries_to_come_back_it_waits_less_than_a_second(transport, monkeypatch):
    bounds: list[float] = []
    monkeypatch.setattr(retry, "uniform", lambda low, high: bounds.append(high) or 0.0)
    member = Member(transport)
    control = transport.control()
    assert isinstance(member.handles(), Welcome)
    transport.refusals = [CannotReachServer("away")] * 20
    control.say(CannotReachServer("away"))
    transport.control()
    assert max(bounds) == attendance_module.RECONNECT_S < 1.0
    assert len(bounds) > 20
    member.attendance.close()


def test_a_coordinator_that_is_never_there_is_given_up_with_attempts_and_seconds(transport):
    transport.refusals = [CannotReachServer("connection refused")]
    member = Member(transport, budget_s=0.0)
    error = member.fails_with()
    assert isinstance(error, CannotReachServer)
    assert error.facts == {"address": "nowhere:1", "attempts": "1", "seconds": "0.0"}
    assert "1 tries in 0.0 s" in error.message
    assert "connection refused" in error.message
    member.attendance.close()


def test_a_coordinator_that_comes_late_is_found(transport):
    transport.refusals = [CannotReachServer("not yet")] * 3
    member = Member(transport)
    transport.control()
    assert isinstance(member.handles(), Welcome)
    assert member.failures.empty()
    member.attendance.close()


@pytest.mark.parametrize("error", [Unauthenticated("no"), VersionSkew("old"), Internal("x")])
def test_a_refusal_is_final(transport, error):
    transport.refusals = [error]
    assert Member(transport).fails_with() is error
    assert transport.controls.empty()


def test_a_defect_in_handling_ends_the_member_instead_of_leaving_it_deaf(transport, caplog):
    member = Member(transport)
    transport.control().say(Notice(job="", text="break"))
    error = member.fails_with()
    assert isinstance(error, Internal)
    assert "a defect" in caplog.text


def test_closing_ends_the_stream_and_is_idempotent(transport):
    member = Member(transport)
    transport.control()
    assert isinstance(member.handles(), Welcome)
    member.attendance.close()
    member.attendance.close()
    assert not member.attendance._thread.is_alive()
    assert member.failures.empty()


def test_a_member_that_closes_before_it_has_begun_ends_all_the_same(transport):
    attendance = Attendance(
        transport, "a:1", hello=Hello, renewal=Renewal, handle=print, failed=print
    )
    attendance.close()
