"""The cluster, its shards and its workers."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from adashard_server.cluster.statistics import ShardStatistics, WorkerStatistics
from adashard_server.http.pagination import Cursor, Key, Limit, page
from adashard_server.http.paths import find_job
from adashard_server.http.schemas import Cluster, Listing, Shard, Worker
from adashard_server.http.sources import From

router = APIRouter(prefix="/api/v1", tags=["cluster"])

_NO_RANK = 2**31


@router.get("/cluster", summary="The cluster at a glance")
async def read_cluster(sources: From) -> Cluster:
    """Versions, addresses, counts, and what readiness waits for."""
    return Cluster.of(sources.view.cluster_statistics())


@router.get("/shards", summary="All shards")
async def list_shards(sources: From, limit: Limit = 100, cursor: Cursor = None) -> Listing[Shard]:
    """Shards by index: where they are, on which device, and what they hold over all jobs."""
    shards, next_cursor = page(
        sources.view.shard_statistics(), _shard_key, limit=limit, cursor=cursor
    )
    return Listing(items=[Shard.of(shard) for shard in shards], next_cursor=next_cursor)


@router.get("/workers", summary="All workers")
async def list_workers(
    sources: From,
    job: Annotated[str | None, Query(description="Only workers of this job.")] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Listing[Worker]:
    """Workers by job and rank: where they are, and which step's weights they hold."""
    if job is not None:
        find_job(sources, job)
    workers, next_cursor = page(
        sources.view.worker_statistics(job), _worker_key, limit=limit, cursor=cursor
    )
    return Listing(items=[Worker.of(worker) for worker in workers], next_cursor=next_cursor)


def _shard_key(shard: ShardStatistics) -> Key:
    return shard.index, shard.id


def _worker_key(worker: WorkerStatistics) -> Key:
    return worker.job, _NO_RANK if worker.rank is None else worker.rank, worker.id
