"""Fixtures of the client's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.client.stage import Stage

from adashard import retry


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
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: 0.0)
