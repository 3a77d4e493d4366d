"""What the routes read from, handed to each of them by FastAPI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from adashard_server.cluster.statistics import ClusterView
from adashard_server.http.streams import Streams
from adashard_server.telemetry.history import History
from adashard_server.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The coordinator, its history and metrics, the clock in seconds since 1970, open streams."""

    view: ClusterView
    history: History
    metrics: Metrics
    clock: Callable[[], float]
    streams: Streams


async def sources(request: Request) -> Sources:
    """The sources of this app; async, so that it runs in the coordinator's own thread."""
    return cast(Sources, request.app.state.sources)


From = Annotated[Sources, Depends(sources)]
