"""Names of jobs in paths. A name is what a user typed: it may hold slashes, spaces, any script.

In a path it is percent-encoded, so the job `a/b` is at `/api/v1/jobs/a%2Fb`. ASGI hands over the
path decoded, in which that slash looks like a border between segments. `EncodedSlashes` therefore
gives the router a path in which `%2F` and `%25` stay encoded, and `known_job` decodes them:
unambiguous for every name, also for one that holds `%2F` itself.
"""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import unquote

from fastapi import Depends, Path
from starlette.types import ASGIApp, Receive, Scope, Send

from adashard.wire.errors import UnknownJob
from adashard_server.cluster.statistics import JobStatistics
from adashard_server.http.sources import From, Sources

_KEEP_ENCODED = re.compile(rb"%(25|2[fF])")


class EncodedSlashes:
    """Middleware that keeps encoded slashes and percent signs apart from plain ones."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on with its path in the form described above."""
        raw_path: bytes | None = scope.get("raw_path")
        if scope["type"] == "http" and raw_path is not None and raw_path.startswith(b"/api/"):
            kept = _KEEP_ENCODED.sub(rb"%25\1", raw_path)
            scope = {**scope, "path": unquote(kept.decode("latin-1"))}
        await self._app(scope, receive, send)


async def known_job(
    job: Annotated[str, Path(description="Name of the job, percent-encoded.")], sources: From
) -> JobStatistics:
    """The job that a path names.

    Raises:
        UnknownJob: there is none of that name.
    """
    return find_job(sources, unquote(job))


def find_job(sources: Sources, name: str) -> JobStatistics:
    """The job of this name.

    Raises:
        UnknownJob: there is none.
    """
    for job in sources.view.job_statistics():
        if job.name == name:
            return job
    raise UnknownJob(f"There is no job {name!r} here.", job=name)


KnownJob = Annotated[JobStatistics, Depends(known_job)]
