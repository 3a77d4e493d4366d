"""Probes and metrics: what machines ask."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from adashard_server.http.schemas import Health, Readiness
from adashard_server.http.sources import From
from adashard_server.telemetry.metrics import Snapshot

router = APIRouter(tags=["operation"])


@router.get("/healthz", summary="The process answers")
@router.get("/livez", name="read_liveness", summary="The process answers")
async def read_health(sources: From) -> Health:
    """Answers 200 as long as the process can answer at all."""
    return Health(status="ok", version=sources.view.cluster_statistics().version)


@router.get(
    "/readyz",
    summary="The cluster takes work",
    responses={503: {"model": Readiness, "description": "Not ready, with reasons."}},
)
async def read_readiness(sources: From, response: Response) -> Readiness:
    """Answers 200 when work is taken, and 503 with reasons when it is not."""
    reasons = list(sources.view.cluster_statistics().not_ready)
    response.status_code = 503 if reasons else 200
    return Readiness(ready=not reasons, reasons=reasons)


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def read_metrics(request: Request, sources: From) -> Response:
    """The exposition, in the text format or in OpenMetrics, as the `Accept` header asks."""
    view = sources.view
    sources.metrics.refresh(
        Snapshot(
            cluster=view.cluster_statistics(),
            jobs=view.job_statistics(),
            shards=view.shard_statistics(),
            workers=view.worker_statistics(),
        )
    )
    body, content_type = sources.metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})
