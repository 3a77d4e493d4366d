import asyncio
import signal
import threading
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest

from adashard.wire.errors import PortInUse
from adashard_server.http.server import HttpServer


@asynccontextmanager
async def serving(app):
    server = HttpServer(app)
    port = await server.start()
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        await server.stop()


@asynccontextmanager
async def lines_of(url):
    """The lines of an open stream, one after the other."""
    async with httpx.AsyncClient(trust_env=False) as client, client.stream("GET", url) as stream:
        yield stream.aiter_lines()


async def next_event(lines):
    while True:
        line = await anext(lines)
        if line.startswith("event: "):
            return line.removeprefix("event: ")


def test_it_serves_on_a_free_port_and_leaves_signals_alone(app):
    async def serve():
        async with (
            serving(app) as (_, url),
            httpx.AsyncClient(trust_env=False) as client,
        ):
            answer = await client.get(f"{url}/healthz")
            return answer.json()["status"], signal.getsignal(signal.SIGTERM)

    assert asyncio.run(serve()) == ("ok", signal.SIG_DFL)


def test_every_stream_sees_steps_as_they_happen_in_the_coordinators_thread(app, view, training):
    async def watch_training():
        view.thread = threading.get_ident()
        async with serving(app) as (_, url):
            path = f"{url}/api/v1/jobs/demo/events"
            async with lines_of(path) as one, lines_of(path) as other:
                first = [await next_event(lines) for lines in (one, other)]
                training.run(2)
                return first, [await next_event(lines) for lines in (one, other)]

    assert asyncio.run(watch_training()) == (["status"] * 2, ["step"] * 2)


def test_it_stops_though_a_stream_is_open_and_the_reader_sees_a_clean_end(app):
    async def stop_under_a_reader():
        async with serving(app) as (server, url), lines_of(f"{url}/api/v1/events") as lines:
            assert await next_event(lines) == "status"
            stopping = asyncio.create_task(server.stop())
            rest = [line async for line in lines]
            await stopping
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        return rest

    assert len(asyncio.run(stop_under_a_reader())) < 10


def test_a_place_is_free_again_when_a_reader_goes(app):
    streams = app.state.sources.streams
    slot = streams.slot

    async def read_and_go():
        freed = asyncio.Event()

        @contextmanager
        def telling_slot():
            try:
                with slot():
                    yield
            finally:
                freed.set()

        streams.slot = telling_slot
        async with serving(app) as (_, url):
            async with lines_of(f"{url}/api/v1/events") as lines:
                await next_event(lines)
                held = streams.open_count
            await freed.wait()
            return held, streams.open_count

    assert asyncio.run(read_and_go()) == (1, 0)


def test_a_port_that_is_taken_is_named(app):
    async def start_twice():
        async with serving(app) as (_, url):
            port = int(url.rpartition(":")[2])
            with pytest.raises(PortInUse, match=f"127.0.0.1:{port}") as refused:
                await HttpServer(app, port=port).start()
            return refused.value.facts["port"] == str(port)

    assert asyncio.run(start_twice())
