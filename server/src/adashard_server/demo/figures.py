"""What REST says about the demo's job: bytes of state, and bytes on the way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from adashard.wire.errors import CannotReachServer

INTERVAL_S = 1.0
TIMEOUT_S = 5.0
SETTLE_S = 5.0
_SETTLE_TICK_S = 0.1
_LOOK_BACK = 8  # shards report a step one by one: the newest are read again


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Numbers of a job.

    Attributes:
        state_bytes: optimizer state on all shards.
        adam_bytes: what Adam would hold for the same model.
        pushed_bytes: gradients that shards have received, over all steps so far.
        pulled_bytes: weights that shards have sent, likewise.
    """

    state_bytes: int
    adam_bytes: int
    pushed_bytes: int
    pulled_bytes: int


class FiguresReader:
    """Reads the figures of one job, again and again; every step is counted once.

    Args:
        url: of the coordinator, without a slash at the end.
        job: its name.
        transport: answers instead of the network, for tests.
    """

    def __init__(self, url: str, job: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self._job = job
        # No proxy of the environment stands between two processes of one machine.
        self._http = httpx.Client(
            base_url=url, timeout=TIMEOUT_S, trust_env=False, transport=transport
        )
        self._moved: dict[int, tuple[int, int]] = {}
        self._due_s = 0.0
        self._newest: Figures | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def newest(self) -> Figures | None:
        """The figures, at most about a second old; None as long as there is no job."""
        now_s = time.monotonic()
        if now_s >= self._due_s:
            self._due_s = now_s + INTERVAL_S
            self._read()
        return self._newest

    def after(self, step: int) -> Figures:
        """The figures with `step` in them; what there is if that takes more than `SETTLE_S`.

        Raises:
            CannotReachServer: nothing was heard of the job at all.
        """
        end_s = time.monotonic() + SETTLE_S
        self._read()
        while not self._complete(step) and time.monotonic() < end_s:
            time.sleep(_SETTLE_TICK_S)
            self._read()
        if self._newest is None:
            raise CannotReachServer(f"no figures of job {self._job!r} at {self._http.base_url}")
        return self._newest

    def _complete(self, step: int) -> bool:
        return self._newest is not None and self._newest.state_bytes > 0 and step in self._moved

    def _read(self) -> None:
        """Reads what is new; an answer that does not come leaves what was known."""
        try:
            state = self._get("/state")
            first = max(self._moved, default=0) - _LOOK_BACK
            steps = self._get("/steps", {"from": max(1, first), "max_points": 2000})
        except httpx.HTTPError:
            return
        for step in steps["items"]:
            self._moved[step["step"]] = (step["pushed_bytes"], step["pulled_bytes"])
        self._newest = Figures(
            state_bytes=state["total_bytes"],
            adam_bytes=state["adam_bytes"],
            pushed_bytes=sum(pushed for pushed, _ in self._moved.values()),
            pulled_bytes=sum(pulled for _, pulled in self._moved.values()),
        )

    def _get(self, path: str, query: dict[str, int] | None = None) -> Any:  # noqa: ANN401 - JSON
        answer = self._http.get(f"/api/v1/jobs/{self._job}{path}", params=query)
        answer.raise_for_status()
        return answer.json()
