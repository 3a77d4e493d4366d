"""A real browser, and the page served over a coordinator in memory."""

import asyncio
import shutil
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
from playwright.sync_api import expect, sync_playwright
from tests.http.fakes import FakeView, Training

from adashard_server.http.app import create_app
from adashard_server.http.server import HttpServer
from adashard_server.telemetry.history import History
from adashard_server.telemetry.metrics import Metrics

# Generous: a busy machine is slow, and a page that is right passes as soon as it is.
expect.set_options(timeout=30_000)

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Site:
    """A server in a thread of its own; everything that touches the coordinator runs there."""

    def __init__(self):
        self.view = FakeView()
        self.history = History()
        self.training = Training(self.view, self.history)
        self.training.now_s = time.time()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def start(self):
        self._thread.start()
        self.call(self._start)

    def stop_serving(self):
        asyncio.run_coroutine_threadsafe(self._server.stop(), self._loop).result()

    def stop(self):
        self.stop_serving()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, change):
        """Run a function in the coordinator's thread, and return its result."""

        async def run():
            result = change()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    async def _start(self):
        self.view.thread = threading.get_ident()
        self._server = HttpServer(create_app(self.view, self.history, Metrics("0.1.0")))
        self.url = f"http://127.0.0.1:{await self._server.start()}"


@pytest.fixture
def site():
    site = Site()
    site.start()
    yield site
    site.stop()


# Not for the whole session: while it is open, this thread cannot run an event loop of its own.
@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def watched_page(browser, url, **options):
    """A page that must neither write an error to its console nor ask another host."""
    trouble = []

    def on_request(request):
        if not request.url.startswith((url, "data:")):
            trouble.append(f"asked for {request.url}")

    with browser.new_context(**options) as context:
        page = context.new_page()
        page.on("console", lambda line: line.type == "error" and trouble.append(line.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", on_request)
        yield page
    assert trouble == []


@pytest.fixture
def open_page(browser, site):
    """Open a path of the site in a page that is watched."""
    with ExitStack() as pages:

        def open_page(path="/", **options):
            page = pages.enter_context(watched_page(browser, site.url, **options))
            page.goto(f"{site.url}{path}")
            return page

        yield open_page
