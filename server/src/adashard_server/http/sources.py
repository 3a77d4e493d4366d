"""What the routes read from, handed to each of them by FastAPI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, Request

from adashard_server.cluster.statistics import ClusterView
from adashard_server.http.streams import Streams
from adashard_server.telemetry.history import History
from adashard_server.telemetry.metrics import Metrics

Create = Callable[[str], Awaitable[Mapping[str, str]]]
"""Makes a checkpoint of a job; the facts of the event that tells of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The coordinator, its history and metrics, the clock in seconds since 1970, open streams.

    And what makes a checkpoint of a job, with the cluster's token, which that takes.
    """

    view: ClusterView
    history: History
    metrics: Metrics
    clock: Callable[[], float]
    streams: Streams
    create_checkpoint: Create
    token: str = field(default="", repr=False)


async def sources(request: Request) -> Sources:
    """The sources of this app; async, so that it runs in the coordinator's own thread."""
    return cast(Sources, request.app.state.sources)


From = Annotated[Sources, Depends(sources)]
