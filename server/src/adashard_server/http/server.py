"""The app on a port, inside an event loop that somebody else runs."""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import suppress

import uvicorn
from fastapi import FastAPI

from adashard.wire.errors import PortInUse
from adashard_server.http.sources import Sources

GRACE_S = 2
"""Seconds that answers in flight may take when the server stops; then they are cut."""


class HttpServer:
    """Serves the app until it is stopped; leaves signals to its owner.

    Args:
        app: as `create_app` makes it.
        host: address to listen on.
        port: to listen on; 0 for a free one.
    """

    def __init__(self, app: FastAPI, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._app = app
        self._host = host
        self._port = port
        self._server: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            PortInUse: somebody else listens there.
            OSError: the address is not one of this machine.
        """
        listener = _listen(self._host, self._port)
        port: int = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="off",
            timeout_graceful_shutdown=GRACE_S,
        )
        self._server = _Uvicorn(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        return port

    async def stop(self) -> None:
        """End event streams at once, let answers in flight finish, and close; idempotent."""
        if self._server is None or self._serving is None:
            return
        sources: Sources = self._app.state.sources
        sources.streams.close()
        self._server.should_exit = True
        with suppress(asyncio.CancelledError):
            await self._serving
        self._server = self._serving = None


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: the process has more to end than this server."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await self._serve(sockets)


def _listen(host: str, port: int) -> socket.socket:
    # Listening before uvicorn starts: the port is known, and a refusal is ours to explain.
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(128)
    except OSError as refusal:
        listener.close()
        if refusal.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"Something listens on {host}:{port} already.", host=host, port=port
            ) from refusal
        raise
    listener.setblocking(False)
    return listener
