"""`adashard status`: a cluster in a few lines of text, read over REST."""

from __future__ import annotations

from typing import Any

import httpx

from adashard.wire.errors import CannotReachServer

_TIMEOUT_S = 5.0


def fetch(url: str) -> dict[str, Any]:
    """Cluster, shards, workers and jobs as REST tells them.

    Raises:
        CannotReachServer: nobody answers at `url`.
    """
    try:
        with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
            found = {"cluster": _get(client, "cluster")}
            for name in ("shards", "workers", "jobs"):
                found[name] = _get(client, name)["items"]
            return found
    except httpx.HTTPError as error:
        raise CannotReachServer(
            f"no adashard REST at {url} ({error})",
            remedy="Is it running? `adashard up`, or `docker compose up -d`; --url says where.",
            url=url,
        ) from None


def _get(client: httpx.Client, name: str) -> Any:  # noqa: ANN401 - JSON
    return client.get(f"/api/v1/{name}").raise_for_status().json()


def describe(found: dict[str, Any]) -> str:
    """The same for people."""
    cluster = found["cluster"]
    lines = [
        f"adashard {cluster['version']} at {cluster['address']}, registry {cluster['registry']}"
    ]
    for shard in found["shards"]:
        lines.append(
            f"  shard {shard['index']}  {shard['address']}  {shard['device']}  {shard['status']}"
        )
    for job in found["jobs"]:
        lines.append(
            f"  job {job['name']!r}: {job['status']}, step {max(job['version'], 0)}, "
            f"generation {job['generation']}, {job['worker_count']} workers"
        )
    for worker in found["workers"]:
        rank = "-" if worker["rank"] is None else worker["rank"]
        lines.append(
            f"    worker {rank}  {worker['host']}:{worker['pid']}  step {max(worker['step'], 0)}  "
            f"{worker['status']}  job {worker['job']!r}"
        )
    return "\n".join(lines)
