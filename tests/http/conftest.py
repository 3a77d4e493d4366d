"""The app over a coordinator in memory, asked without a network."""

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest
from tests.http.fakes import START_S, FakeView, Training

from adashard_server.http.app import create_app
from adashard_server.telemetry.history import History
from adashard_server.telemetry.metrics import Metrics


@pytest.fixture
def view():
    return FakeView()


@pytest.fixture
def history():
    return History()


@pytest.fixture
def training(view, history):
    return Training(view, history)


@pytest.fixture
def app(view, history):
    return create_app(view, history, Metrics("0.1.0"), clock=lambda: START_S + 10)


@asynccontextmanager
async def client_of(app):
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


@pytest.fixture
def get(app):
    """Ask for a path, and get the response."""

    def get(path, **options):
        async def ask():
            async with client_of(app) as client:
                return await client.get(path, **options)

        return asyncio.run(ask())

    return get


@pytest.fixture
def ask(app):
    """Send a request of any method, and get the response."""

    def ask(method, path, **options):
        async def send():
            async with client_of(app) as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    return ask
