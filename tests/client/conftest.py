"""Fixtures of the client's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.client.sessions import FakeSession
from tests.client.stage import Stage

from adashard import optimizer, retry


@pytest.fixture
def stage() -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(*arguments, **options) -> Stage:
        made.append(Stage(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.session.abandon()


@pytest.fixture
def no_waits(monkeypatch):
    monkeypatch.setattr(retry, "uniform", lambda low, high: 0.0)


@pytest.fixture
def sessions(monkeypatch) -> list[FakeSession]:
    """The sessions of all optimizers that are made, none of which has anybody around it."""
    monkeypatch.setattr(FakeSession, "made", [], raising=False)
    monkeypatch.setattr(FakeSession, "error", None)
    monkeypatch.setattr(optimizer, "Session", FakeSession)
    monkeypatch.delenv("ADASHARD_ADDRESS", raising=False)
    monkeypatch.delenv("ADASHARD_TOKEN", raising=False)
    return FakeSession.made
