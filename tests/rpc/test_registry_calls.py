"""What is asked of a registry is asked until it answers, and people hear once that it does not."""

from __future__ import annotations

import asyncio

import pytest

from adashard.wire.errors import CannotReachServer
from adashard_server.cluster.registry import MemoryRegistry
from adashard_server.rpc import registry_calls
from adashard_server.rpc.registry_calls import RegistryCalls

pytestmark = pytest.mark.asyncio


class Away(MemoryRegistry):
    """A registry that does not answer the next `failures` questions."""

    failures = 0

    def jobs(self) -> list[str]:
        if self.failures:
            self.failures -= 1
            raise CannotReachServer("away")
        return super().jobs()


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(registry_calls, "RETRY_S", 0.0)


@pytest.fixture
def heard() -> list[str]:
    return []


@pytest.fixture
def registry() -> Away:
    return Away()


@pytest.fixture
def calls(registry, heard) -> RegistryCalls:
    return RegistryCalls(
        registry, lambda error: heard.append(error.message), lambda: heard.append("back")
    )


@pytest.mark.parametrize("failures", [1, 5])
async def test_a_question_is_repeated_until_it_is_answered_and_that_is_told_once(
    calls, registry, heard, failures
):
    registry.failures = failures
    assert await calls.ask(lambda asked: asked.jobs()) == []
    assert heard == ["away", "back"]
    registry.failures = failures
    await calls.ask(lambda asked: asked.jobs())
    assert heard == ["away", "back"] * 2


async def test_of_a_registry_that_answers_nothing_is_told(calls, heard):
    assert await calls.ask(lambda asked: asked.jobs()) == []
    assert heard == []


async def test_questions_are_asked_one_at_a_time_in_the_order_they_came(calls, registry):
    registry.failures = 3
    answered: list[int] = []

    async def ask(number: int) -> None:
        await calls.ask(lambda asked: asked.jobs())
        answered.append(number)

    await asyncio.gather(*(ask(number) for number in range(4)))
    assert answered == [0, 1, 2, 3]


async def test_a_defect_is_not_repeated(calls, heard):
    with pytest.raises(ZeroDivisionError):
        await calls.ask(lambda asked: 1 // 0)
    assert heard == []
