"""A keeper has one process run, whatever becomes of it, until it is stopped."""

from __future__ import annotations

import queue
import threading

import pytest

from adashard.wire.errors import AdashardError, Internal, Unauthenticated
from adashard_server.launch import restarts
from adashard_server.launch import spare as spare_module
from adashard_server.launch.keeper import Keeper
from adashard_server.launch.spare import Spare

WAIT_S = 60.0
KILLED = (-9, None)


class FakeProcess:
    """A process whose end is in the test's hand."""

    def __init__(self, refusal: AdashardError | None = None) -> None:
        self.refusal = refusal
        self.activated = False
        self.stopped = threading.Event()
        self._ends: queue.SimpleQueue[tuple[int, AdashardError | None]] = queue.SimpleQueue()
        self._ended: tuple[int, AdashardError | None] | None = None

    @property
    def exit_code(self) -> int | None:
        return self._ended[0] if self._ended else None

    def end(self, code: int, error: AdashardError | None = None) -> None:
        self._ended = code, error
        self._ends.put(self._ended)

    def activate(self) -> None:
        self.activated = True

    def wait_ready(self) -> None:
        if self.refusal is not None:
            self.end(1, self.refusal)
            raise self.refusal

    def wait_end(self) -> tuple[int, AdashardError | None]:
        return self._ends.get(timeout=WAIT_S)

    def wait(self) -> int:
        return self.wait_end()[0]

    def terminate(self) -> None:
        self.stopped.set()
        self.end(0)

    def stop(self) -> None:
        self.terminate()


class Stage:
    """A keeper with all processes that it has started."""

    def __init__(self, *refusals: AdashardError, restart: bool = True) -> None:
        self.started: queue.SimpleQueue[FakeProcess] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[tuple[str, AdashardError, bool]] = queue.SimpleQueue()
        self._refusals = list(refusals)
        self.keeper = Keeper("shard-0", self._make, restart=restart, lost=self._note)
        self.first = self.next()
        self.keeper.watch()

    def _make(self, first: bool) -> FakeProcess:
        refusal = None if first or not self._refusals else self._refusals.pop(0)
        process = FakeProcess(refusal)
        self.started.put(process)
        return process

    def _note(self, name: str, error: AdashardError, asked: bool) -> None:
        self.lost.put((name, error, asked))

    def next(self) -> FakeProcess:
        return self.started.get(timeout=WAIT_S)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(restarts, "FIRST_WAIT_S", 0.0)


def test_a_process_that_dies_is_brought_back_each_time():
    stage, process = Stage(), None
    for times in (1, 2, 3):
        (process or stage.first).end(*KILLED)
        process = stage.next()
        assert stage.keeper.wait_restarted(times, WAIT_S)
        assert stage.keeper.process is process
    stage.keeper.stop()
    assert process.stopped.is_set()
    assert stage.lost.empty()


def test_nothing_is_started_after_it_was_stopped():
    stage = Stage()
    stage.keeper.forgo()
    stage.first.end(*KILLED)
    stage.keeper.stop()
    assert not stage.keeper._watcher.is_alive()
    assert stage.started.empty()
    stage.keeper.restart()
    assert stage.started.empty()
    assert stage.lost.empty()


def test_a_process_that_fails_to_come_back_is_tried_again():
    stage = Stage(Internal("not yet"), Internal("nor yet"))
    stage.first.end(*KILLED)
    for _ in range(3):
        process = stage.next()
    assert stage.keeper.wait_restarted(1, WAIT_S)
    assert stage.keeper.process is process
    stage.keeper.stop()


def test_what_cannot_come_back_is_given_up_with_the_reason():
    stage = Stage(Unauthenticated("no valid token"))
    stage.first.end(*KILLED)
    name, error, asked = stage.lost.get(timeout=WAIT_S)
    assert (name, asked) == ("shard-0", False)
    assert "no valid token" in error.message
    stage.keeper.stop()


def test_a_process_that_was_asked_to_end_is_not_brought_back():
    stage = Stage()
    stage.first.end(0)
    name, _, asked = stage.lost.get(timeout=WAIT_S)
    assert (name, asked) == ("shard-0", True)
    stage.keeper.stop()
    assert stage.keeper.times == 0


def test_without_restarts_a_process_comes_back_by_hand():
    stage = Stage(restart=False)
    stage.first.end(*KILLED)
    stage.keeper.restart()
    assert stage.keeper.process is stage.next()
    assert stage.keeper.times == 1
    stage.keeper.stop()


# --- a process that stands by --------------------------------------------------------------------


@pytest.fixture
def standing_by(monkeypatch):
    """A spare, and the processes that it has started."""
    monkeypatch.setattr(spare_module, "AFTER_S", 0.0)
    seen: list[FakeProcess] = []

    def make() -> FakeProcess:
        seen.append(FakeProcess())
        return seen[-1]

    spare = Spare(make)
    yield spare, seen
    spare.stop()


def taken(spare: Spare) -> FakeProcess:
    """The next process that stands by, as soon as there is one."""
    while (process := spare.take()) is None:
        pass
    return process


def test_the_process_that_stands_by_is_activated_and_followed_by_another(standing_by):
    spare, seen = standing_by
    assert spare.take() is None, "nothing stands by yet"
    spare.start()
    first, second = taken(spare), taken(spare)
    assert seen[:2] == [first, second]
    assert first.activated
    assert second.activated


def test_one_that_has_died_standing_by_is_not_taken(standing_by):
    spare, seen = standing_by
    spare.start()
    while not seen:
        pass
    seen[0].end(*KILLED)
    assert taken(spare) is not seen[0]
    assert seen[0].stopped.is_set()


def test_a_spare_that_was_not_needed_ends_with_the_cluster(standing_by):
    spare, seen = standing_by
    spare.start()
    while not seen:
        pass
    spare.stop()
    assert seen[0].stopped.is_set()
    assert not seen[0].activated
