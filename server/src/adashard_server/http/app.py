"""The REST edge as one ASGI app: routes, page, errors. It knows the coordinator only as a view."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from fastapi import FastAPI

from adashard.wire.errors import CheckpointUnwritable
from adashard_server.cluster.statistics import ClusterView
from adashard_server.http import problems
from adashard_server.http.paths import EncodedSlashes
from adashard_server.http.requests import RequestContext
from adashard_server.http.routes import checkpoints, cluster, errors, events, health, jobs, site
from adashard_server.http.sources import Create, Sources
from adashard_server.http.streams import Streams
from adashard_server.telemetry.history import History
from adashard_server.telemetry.metrics import Metrics

_DESCRIPTION = (
    "Read what an adashard cluster does. Bytes and seconds are plain numbers, their unit is in "
    "the name; lists come in pages; errors are problem documents (RFC 9457)."
)

_TAGS = [
    {"name": "cluster", "description": "Who is there."},
    {"name": "jobs", "description": "What is trained, and how it goes."},
    {"name": "events", "description": "What changes, as it changes."},
    {"name": "operation", "description": "Probes, metrics, the catalogue of errors."},
]


def create_app(
    view: ClusterView,
    history: History,
    metrics: Metrics,
    *,
    clock: Callable[[], float] = time.time,
    create_checkpoint: Create | None = None,
    token: str = "",
) -> FastAPI:
    """Build the app that shows a coordinator.

    All handlers are coroutines and call `view` in the event loop that serves them, which has to be
    the coordinator's own. Serve it with `http.server.HttpServer`, which ends the event streams
    before it waits for connections; behind another server call `app.state.sources.streams.close()`.

    Args:
        view: the coordinator.
        history: the steps of its jobs.
        metrics: what Prometheus asks for.
        clock: seconds since 1970.
        create_checkpoint: makes one of a job; None where none can be made.
        token: the cluster's secret; empty for none.
    """
    app = FastAPI(
        title="adashard",
        version=view.cluster_statistics().version,
        description=_DESCRIPTION,
        openapi_tags=_TAGS,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        separate_input_output_schemas=False,
    )
    app.state.sources = Sources(
        view=view,
        history=history,
        metrics=metrics,
        clock=clock,
        streams=Streams(epoch=f"{int(clock() * 1000):x}"),
        create_checkpoint=create_checkpoint or _no_directory,
        token=token,
    )
    for room in (cluster, jobs, checkpoints, events, health, errors):
        app.include_router(room.router)
    site.mount(app)
    problems.install(app)
    app.add_middleware(EncodedSlashes)
    app.add_middleware(RequestContext)
    return app


async def _no_directory(job: str) -> Mapping[str, str]:
    raise CheckpointUnwritable(f"there is no directory for a checkpoint of job {job!r}")
