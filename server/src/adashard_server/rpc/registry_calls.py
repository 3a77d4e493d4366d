"""Calls of the registry, repeated for as long as it does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from adashard.wire.errors import AdashardError
from adashard_server.cluster.registry import Registry

T = TypeVar("T")

RETRY_S = 1.0


class RegistryCalls:
    """Asks a registry until it answers, one question at a time, in threads, since it may block.

    Args:
        registry: whom to ask.
        gone: called with the first error, once until it answers again.
        back: called when it answers again.
    """

    def __init__(
        self,
        registry: Registry,
        gone: Callable[[AdashardError], None],
        back: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._gone, self._back = gone, back
        self._away = False
        self._turn = asyncio.Lock()

    async def ask(self, question: Callable[[Registry], T]) -> T:
        """The answer to `question`, however long that takes.

        Args:
            question: asked again after an error of the catalogue. Its answer may have been lost
                where it was carried out, so it must bear being repeated.
        """
        async with self._turn:
            while True:
                try:
                    answer = await asyncio.to_thread(question, self._registry)
                except AdashardError as error:
                    if not self._away:
                        self._away = True
                        self._gone(error)
                    await asyncio.sleep(RETRY_S)
                    continue
                if self._away:
                    self._away = False
                    self._back()
                return answer
