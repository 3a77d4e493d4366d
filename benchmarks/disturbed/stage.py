"""A cluster of processes with fail points, a crew that trains through it, and what is played there.

All runs take the same steps of the same training. Its first steps are calm; then a fault is placed,
and the others follow. What a fault leaves behind, the launcher and the crew make good, so that one
stage serves many faults.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

import httpx

from adashard.failpoints import POINTS, VARIABLE, Armed, Role
from adashard_server import LocalCluster
from adashard_server.launch import restarts, spare

from .cases import CALM_STEPS, STEPS, WORKERS, Case, Outcome, Step
from .crew import Crew, Ended, Failed, Silent, TraineeProcess

SHARDS = 2
HANG_S = 30.0
_LOOK_S = 0.02


@contextmanager
def cluster(**options: Any) -> Iterator[LocalCluster]:
    """A running cluster whose processes are brought back at once, however often they die."""
    with (
        mock.patch.object(restarts, "STEADY_S", 0.0),
        mock.patch.object(spare, "AFTER_S", 0.0),
        LocalCluster(SHARDS, **options) as running,
    ):
        yield running


class DidNotHappen(Exception):
    """A fault was placed where the run never came."""


class Stage:
    """A running cluster with a crew, from `with` to its end. For one thread.

    Args:
        options: of the cluster.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._stack = ExitStack()
        self._numbers = itertools.count(1)
        self._calm = cache(self._play_calm)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            environment = {VARIABLE: str(self._folder)}
            stack.enter_context(mock.patch.dict(os.environ, environment))
            self._crew = Crew(WORKERS, environment)
            stack.callback(self._crew.stop)
            self.cluster = stack.enter_context(cluster(**self._options))
            self._http = stack.enter_context(
                httpx.Client(base_url=self.cluster.url, trust_env=False)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    # --- what is played -------------------------------------------------------------------------

    def play(self, case: Case) -> Outcome:
        """One run with what the case does to it.

        Raises:
            Silent: a step has not ended in `HANG_S`.
            Failed: a step has raised.
            DidNotHappen: the run never came to the fail point.
        """
        trainees, armed = self._ready(), list[Armed]()
        try:
            if case.from_start:
                armed = self._arm(case, trainees)
            self._join(trainees)
            steps = self._train(trainees, CALM_STEPS)
            if not case.from_start:
                armed = self._arm(case, trainees)
            happened_s = self._kill(case.killed)
            outcome = self._train(trainees, STEPS, mortal=case.loses_a_worker)
            happened = [*happened_s, *(one.happened_s for one in armed)]
        finally:
            for one in armed:
                one.disarm()
            self._dismiss(trainees)
        if None in happened:
            raise DidNotHappen(str(case))
        return Outcome(
            digests=outcome.digests,
            steps=(*steps.steps, *outcome.steps),
            happened_s=min((one for one in happened if one is not None), default=0.0),
        )

    def expected(self, case: Case, outcome: Outcome) -> str:
        """The digest of the undisturbed run that is to have led to the same weights."""
        if not case.loses_a_worker:
            return self._calm(STEPS, 0)
        return self._calm(outcome.last_together, outcome.survivor)

    def _play_calm(self, together: int, survivor: int) -> str:
        """The digest of a run in which all but one leave after the step `together`."""
        trainees = self._ready()
        self._join(trainees)
        self._train(trainees, together)
        last = trainees[survivor]
        self._dismiss([one for one in trainees if one is not last])
        (digest,) = self._train([last], STEPS).digests.values()
        self._dismiss([last])
        return digest

    # --- how ------------------------------------------------------------------------------------

    def _ready(self) -> list[TraineeProcess]:
        """The trainees, once all of the cluster stands."""
        trainees = self._crew.complete()
        deadline_s = time.monotonic() + 2 * HANG_S
        while not self._whole():
            if time.monotonic() > deadline_s:
                raise Silent("the cluster has not come back")
            time.sleep(_LOOK_S)
        return trainees

    def _whole(self) -> bool:
        processes = self.cluster.processes.values()
        if any(process.exit_code is not None for process in processes):
            return False
        try:
            shards = self._http.get("/api/v1/shards").json()["items"]
        except (httpx.HTTPError, KeyError, ValueError):
            return False
        return sum(shard["status"] == "live" for shard in shards) == SHARDS

    def _join(self, trainees: Sequence[TraineeProcess]) -> None:
        job = f"run-{next(self._numbers)}"
        for index, trainee in enumerate(trainees):
            trainee.tell(
                "join", address=self.cluster.address, job=job, index=index, workers=len(trainees)
            )

    def _train(
        self, trainees: Sequence[TraineeProcess], until: int, *, mortal: bool = False
    ) -> Outcome:
        """Has all of them train at once; of those that may die, only the others count."""
        for trainee in trainees:
            trainee.tell("train", until=until)
        digests, steps = dict[int, str](), tuple[Step, ...]()
        for index, trainee in enumerate(trainees):
            try:
                digest, steps_of_one = _heard(trainee)
            except Ended:
                if not mortal:
                    raise
            else:
                digests[index] = digest
                steps = steps or steps_of_one
        return Outcome(digests=digests, steps=steps)

    def _dismiss(self, trainees: Sequence[TraineeProcess]) -> None:
        """Has them leave their job; one that cannot is replaced."""
        for trainee in trainees:
            trainee.tell("leave")
        for trainee in trainees:
            try:
                while "left" not in trainee.hear(HANG_S):
                    pass
            except (Silent, Failed):
                self._crew.replace(self._crew.trainees.index(trainee))

    def _arm(self, case: Case, trainees: Sequence[TraineeProcess]) -> list[Armed]:
        if case.fault is None:
            return []
        pids = self._pids(case, trainees)
        groups = [(pid,) for pid in pids] if case.everywhere else [tuple(pids)]
        return [
            replace(case.fault, pids=group).arm(self._folder, f"fault-{next(self._numbers)}")
            for group in groups
        ]

    def _pids(self, case: Case, trainees: Sequence[TraineeProcess]) -> list[int]:
        """Processes that the fault may happen in; none where it is to be any that comes there."""
        assert case.fault is not None
        if case.role is Role.WORKER:
            return [trainee.pid for trainee in trainees]
        if len(POINTS[case.fault.point].roles) == 1 and not case.everywhere:
            return []
        return [
            process.pid
            for name, process in self.cluster.processes.items()
            if name.startswith(case.role.value) and name not in case.killed
        ]

    def _kill(self, names: Sequence[str]) -> list[float]:
        """Kills them from outside; when it did."""
        now_s = time.monotonic()
        for name in names:
            self.cluster.processes[name].kill()
        return [now_s] if names else []


def _heard(trainee: TraineeProcess) -> tuple[str, tuple[Step, ...]]:
    """What a trainee says, up to its digest."""
    steps = list[Step]()
    while "digest" not in (said := trainee.hear(HANG_S)):
        steps.append(Step(**said))
    return said["digest"], tuple(steps)
