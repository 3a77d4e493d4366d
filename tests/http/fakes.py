"""A coordinator in memory: statistics that a test sets, and a training that moves."""

import math
import random
import threading
from dataclasses import dataclass, field, replace

from adashard.wire.control import Logged, StepSummary
from adashard_server.cluster.statistics import (
    ClusterStatistics,
    Event,
    JobStatistics,
    ShardStatistics,
    WorkerStatistics,
)
from adashard_server.telemetry.history import History

START_S = 1_800_000_000.0


def a_job(name="demo", **changes):
    return replace(
        JobStatistics(
            name=name,
            status="running",
            status_reason="",
            generation=3,
            version=41,
            algorithm="adafactor",
            worker_count=2,
            min_workers=2,
            shard_count=2,
            parameter_count=27,
            element_count=1_300_000,
            slice_count=27,
            slice_bytes=4 << 20,
            recovery="workers",
            weight_bytes=5_200_000,
            state_bytes={"row": 9_000, "column": 12_000, "vector": 3_000},
            state_bytes_by_shard={"shard-0": 12_500, "shard-1": 11_500},
            adam_bytes=10_400_000,
        ),
        **changes,
    )


def a_shard(index=0, **changes):
    return replace(
        ShardStatistics(
            id=f"shard-{index}",
            index=index,
            address=f"127.0.0.1:{50052 + index}",
            host="node-a",
            pid=4100 + index,
            device="cpu",
            status="live",
            renewed_s_ago=0.4,
            versions={"demo": 41},
            weight_bytes=2_600_000,
            state_bytes={"row": 4_500, "column": 6_000, "vector": 1_500},
            refused_report_count=0,
        ),
        **changes,
    )


def a_worker(rank=0, **changes):
    return replace(
        WorkerStatistics(
            id=f"worker-{rank}",
            job="demo",
            rank=rank,
            host="node-a",
            pid=5200 + (rank or 0),
            version=41,
            status="live",
            renewed_s_ago=0.2,
        ),
        **changes,
    )


def an_event(sequence, name="worker_joined", job="demo", **changes):
    return replace(
        Event(
            sequence=sequence,
            time_s=START_S + sequence,
            job=job,
            name=name,
            text=f"Event {sequence} of {job or 'the cluster'}",
            facts={"worker": "worker-0"},
        ),
        **changes,
    )


@dataclass
class FakeView:
    """A `ClusterView` that answers what was put into it, and only in the thread it belongs to."""

    jobs: list = field(default_factory=lambda: [a_job()])
    shards: list = field(default_factory=lambda: [a_shard(0), a_shard(1)])
    workers: list = field(default_factory=lambda: [a_worker(0), a_worker(1)])
    told: list = field(default_factory=list)
    not_ready: tuple = ()
    uptime_s: float = 12.5
    thread: int | None = None

    def cluster_statistics(self):
        self._check_thread()
        return ClusterStatistics(
            version="0.1.0",
            address="127.0.0.1:50051",
            registry="memory",
            uptime_s=self.uptime_s,
            shard_count=len(self.shards),
            min_shards=1,
            worker_count=len(self.workers),
            job_count=len(self.jobs),
            not_ready=self.not_ready,
        )

    def shard_statistics(self):
        self._check_thread()
        return list(self.shards)

    def worker_statistics(self, job=None):
        self._check_thread()
        return [worker for worker in self.workers if job in (None, worker.job)]

    def job_statistics(self):
        self._check_thread()
        return list(self.jobs)

    def events(self, after=0, job=None):
        self._check_thread()
        return [
            event
            for event in self.told
            if event.sequence > after and (job is None or event.job == job)
        ]

    def _check_thread(self):
        if self.thread is not None:
            assert threading.get_ident() == self.thread, "called outside the coordinator's thread"


class Training:
    """Numbers that look like a training: a falling loss, noise, two shards, two workers."""

    def __init__(self, view: FakeView, history: History, *, job: str = "demo", seed: int = 0):
        self.view = view
        self.history = history
        self.job = job
        self.step = 0
        self.now_s = START_S
        self.random = random.Random(seed)

    def run(self, steps: int):
        """Take `steps` steps; returns the newest point."""
        for _ in range(steps):
            self._take_step()
        self.view.jobs = [
            replace(job, version=self.step) if job.name == self.job else job
            for job in self.view.jobs
        ]
        self.view.shards = [
            replace(shard, versions={self.job: self.step}) for shard in self.view.shards
        ]
        self.view.workers = [replace(worker, version=self.step) for worker in self.view.workers]
        return self.history.latest(self.job)

    def _take_step(self):
        self.step += 1
        noise = self.random.gauss
        seconds = self._phases()
        self.now_s += sum(seconds.values()) + 0.045 + abs(noise(0, 0.004))
        for _ in self.view.workers:
            loss = 2.1 + 3.4 * math.exp(-self.step / 140) + noise(0, 0.06)
            self.history.log(Logged(job=self.job, step=self.step, values={"loss": loss}))
        norm = 0.35 + 1.8 * math.exp(-self.step / 90) + abs(noise(0, 0.06))
        rms = 0.9 + 0.25 * math.exp(-self.step / 60) + noise(0, 0.03)
        rho = min(1e-2, 1 / math.sqrt(self.step))
        for shard in ("shard-0", "shard-1"):
            self.history.add(
                shard,
                StepSummary(
                    job=self.job,
                    step=self.step,
                    phase_s={name: s * (1 + 0.1 * abs(noise(0, 1))) for name, s in seconds.items()},
                    duration_s=sum(seconds.values()),
                    gradient_squared_sum=norm**2 / 2,
                    update_squared_sum=rms**2 * 650_000,
                    element_count=650_000,
                    clip_ratio=max(1.0, rms),
                    lr_requested=0.0,
                    lr_applied=rho,
                    pushed_bytes=2 * 2_600_000,
                    pulled_bytes=2 * 2_606_000,
                ),
                shard_count=2,
                now_s=self.now_s,
            )

    def _phases(self):
        noise = self.random.gauss
        middle = {"receive": 4e-3, "wait": 9e-3, "exchange": 1.5e-3, "apply": 6e-3, "reply": 5e-3}
        return {name: seconds * math.exp(noise(0, 0.25)) for name, seconds in middle.items()}
