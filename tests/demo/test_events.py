import json
import threading

import httpx
import pytest

from adashard_server.demo import events
from adashard_server.demo.events import EventsReader


def told(kind, **data):
    return f"event: {kind}\nid: e-1\ndata: {json.dumps(data)}\n\n"


class Rest:
    """Answers one stream after the other; a reader that asks for more than there are waits."""

    def __init__(self, *streams):
        self._streams = iter(streams)
        self.asked = []
        self.over = threading.Event()

    def answer(self, request):
        self.asked.append(request.url)
        stream = next(self._streams, None)
        if stream is None:
            self.over.set()
            raise httpx.ConnectError("nobody there")
        if isinstance(stream, Exception):
            raise stream
        return httpx.Response(200, text=stream)


@pytest.fixture
def heard(monkeypatch):
    """What a reader has heard when it has read all the streams of a coordinator."""
    monkeypatch.setattr(events, "_RETRY_S", 0.0)

    def read(*streams):
        rest = Rest(*streams)
        transport = httpx.MockTransport(rest.answer)
        with EventsReader("http://coordinator", "demo", transport=transport) as reader:
            rest.over.wait()
            found = list(reader.heard())
        return found, rest

    return read


def test_only_changes_of_membership_are_told_and_in_order(heard):
    stream = (
        told("status", jobs=[])
        + told("membership", text="generation 1", job="demo")
        + told("step", items=[])
        + told("membership", text="generation 1 is open", job="demo")
    )
    found, rest = heard(stream)
    assert found == ["generation 1", "generation 1 is open"]
    assert rest.asked[0].path == "/api/v1/events"
    assert rest.asked[0].params["job"] == "demo"


def test_a_coordinator_that_comes_back_is_heard_again(heard):
    lost, back = (told("membership", text=text) for text in ("lost", "back"))
    found, _ = heard(lost, httpx.ConnectError("it is dead"), back)
    assert found == ["lost", "back"]


def test_what_was_heard_is_not_heard_twice():
    reader = EventsReader("http://coordinator", "demo")
    reader._texts.put("once")
    assert (list(reader.heard()), list(reader.heard())) == (["once"], [])
