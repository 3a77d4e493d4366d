"""What the coordinator tells of a job while it happens: who died, what was made of it."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

import httpx

_SILENCE_S = 10.0  # the stream says something every second; a coordinator that is gone does not
_RETRY_S = 0.5


class EventsReader:
    """Reads the events of one job in a thread of its own, from `with` to its end.

    It connects again where the coordinator has died and come back.

    Args:
        url: of the coordinator, without a slash at the end.
        job: its name.
        transport: answers instead of the network, for tests.
    """

    def __init__(self, url: str, job: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self._http = httpx.Client(
            base_url=url, timeout=_SILENCE_S, trust_env=False, transport=transport
        )
        self._job = job
        self._texts: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adashard-events", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()

    def heard(self) -> Iterator[str]:
        """What has been told since the last call, a sentence each; never waits."""
        while not self._texts.empty():
            yield self._texts.get_nowait()

    def _run(self) -> None:
        with self._http:
            while not self._ended.is_set():
                try:
                    self._listen()
                except httpx.HTTPError:
                    self._ended.wait(_RETRY_S)

    def _listen(self) -> None:
        query = {"job": self._job}
        with self._http.stream("GET", "/api/v1/events", params=query) as answer:
            answer.raise_for_status()
            for text in _membership(answer.iter_lines()):
                if self._ended.is_set():
                    return
                if text:
                    self._texts.put(text)


def _membership(lines: Iterable[str]) -> Iterator[str]:
    """The sentences of membership events; nothing for any other, so that the reader can end."""
    kind = ""
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield json.loads(value)["text"] if kind == "membership" else ""
