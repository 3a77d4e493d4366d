"""Everything that Prometheus can ask for: each metric with its unit, labels and one sentence.

Labels are bounded: job names and shards that are there now, and short lists that are written here.
What is counted per step lives in prometheus-client's objects and is dropped with its job; what can
be read off the coordinator is read when Prometheus asks, so nothing of it can be out of date.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from adashard_server.telemetry.points import StepPoint

PHASES = ("receive", "wait", "exchange", "apply", "reply")
"""Phases of a step that have a histogram; others are shown by REST alone."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class _Cluster(Protocol):
    """What metrics read of the cluster at a glance."""

    @property
    def uptime_s(self) -> float: ...
    @property
    def not_ready(self) -> Sequence[str]: ...


class _Job(Protocol):
    """What metrics read of a job."""

    @property
    def name(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def version(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def state_bytes(self) -> Mapping[str, int]: ...
    @property
    def adam_bytes(self) -> int: ...


class _Shard(Protocol):
    """What metrics read of a shard."""

    @property
    def index(self) -> int: ...
    @property
    def status(self) -> str: ...
    @property
    def renewed_s_ago(self) -> float: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def state_bytes(self) -> Mapping[str, int]: ...
    @property
    def refused_report_count(self) -> int: ...


class _Worker(Protocol):
    """What metrics read of a worker."""

    @property
    def job(self) -> str: ...
    @property
    def status(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The coordinator's view at the moment of a scrape."""

    cluster: _Cluster
    jobs: Sequence[_Job]
    shards: Sequence[_Shard]
    workers: Sequence[_Worker]


class Metrics:
    """All metrics of a coordinator, in a registry of their own.

    Args:
        version: of the distribution, for `adashard_build_info`.
    """

    def __init__(self, version: str) -> None:
        # The `_created` series double the output and are read by nobody here.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._steps = _StepMetrics(self.registry)
        self._view = _ViewCollector(version)
        self.registry.register(self._view)
        self._log_records = Counter(
            "adashard_log_records",
            "Lines written to the log, by logger and level; alert on warnings and errors.",
            ["logger", "level"],
            registry=self.registry,
        )

    def observe(self, job: str, point: StepPoint) -> None:
        """Count one complete step of a job."""
        self._steps.observe(job, point)

    def count_record(self, logger: str, level: str) -> None:
        """Count one line of the log; `logs.configure` takes this as `on_record`."""
        self._log_records.labels(logger=logger, level=level).inc()

    def refresh(self, snapshot: Snapshot) -> None:
        """Replace what is known of the cluster, and drop the series of jobs that are gone."""
        self._view.snapshot = snapshot
        self._steps.keep({job.name for job in snapshot.jobs})

    def forget(self, job: str) -> None:
        """Drop the series of a job; idempotent."""
        self._steps.forget(job)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type, in the format that the `Accept` header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _StepMetrics:
    """What is counted or set once per step."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._jobs: set[str] = set()
        self.steps = Counter(
            "adashard_steps",
            "Steps that a job has completed, by outcome (applied or skipped).",
            ["job_name", "outcome"],
            registry=registry,
        )
        self.duration = Histogram(
            "adashard_step_duration_seconds",
            "Seconds that a phase of a step took on the slowest shard.",
            ["job_name", "phase"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.pushed = Counter(
            "adashard_push_bytes",
            "Bytes of gradients received from workers.",
            ["job_name"],
            registry=registry,
        )
        self.pulled = Counter(
            "adashard_pull_bytes",
            "Bytes of weights sent to workers.",
            ["job_name"],
            registry=registry,
        )
        self.not_finite = Counter(
            "adashard_not_finite_gradients",
            "Gradients with NaN or Inf in them: one for each worker that said so and step, or one "
            "for a step whose sum was not finite.",
            ["job_name"],
            registry=registry,
        )
        self.learning_rate = Gauge(
            "adashard_learning_rate",
            "Learning rate of the first group in the newest step: as requested, and as applied.",
            ["job_name", "kind"],
            registry=registry,
        )
        self.gauges = _newest_step_gauges(registry)

    def observe(self, job: str, point: StepPoint) -> None:
        self._jobs.add(job)
        self.steps.labels(job, "skipped" if point.skipped else "applied").inc()
        self.not_finite.labels(job).inc(max(point.skipped, len(point.not_finite_workers)))
        for phase in PHASES:
            if phase in point.phase_s:
                self.duration.labels(job, phase).observe(point.phase_s[phase])
        self.pushed.labels(job).inc(point.pushed_bytes)
        self.pulled.labels(job).inc(point.pulled_bytes)
        self.learning_rate.labels(job, "requested").set(point.lr_requested)
        self.learning_rate.labels(job, "applied").set(point.lr_applied)
        for name, value in _newest_step_values(point).items():
            self.gauges[name].labels(job).set(value)

    def keep(self, jobs: set[str]) -> None:
        for job in self._jobs - jobs:
            self.forget(job)

    def forget(self, job: str) -> None:
        self._jobs.discard(job)
        counted = (self.steps, self.not_finite, self.duration, self.pushed, self.pulled)
        for metric in (*counted, self.learning_rate, *self.gauges.values()):
            metric.remove_by_labels({"job_name": job})


def _newest_step_gauges(registry: CollectorRegistry) -> dict[str, Gauge]:
    described = {
        "adashard_gradient_norm": "Norm of the mean gradient in the newest step.",
        "adashard_update_rms": "Root mean square of the update, before the step size.",
        "adashard_update_clip_ratio": "Largest factor an update was divided by to clip it.",
        "adashard_loss": "Mean loss that workers reported for the newest step that has one.",
    }
    return {
        name: Gauge(name, text, ["job_name"], registry=registry) for name, text in described.items()
    }


def _newest_step_values(point: StepPoint) -> dict[str, float]:
    values = {
        "adashard_gradient_norm": point.gradient_norm,
        "adashard_update_rms": point.update_rms,
        "adashard_update_clip_ratio": point.clip_ratio,
    }
    if point.loss is not None:
        values["adashard_loss"] = point.loss
    return values


class _ViewCollector(Collector):
    """What is read off the coordinator when Prometheus asks."""

    def __init__(self, version: str) -> None:
        self._version = version
        self.snapshot: Snapshot | None = None

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "adashard_build", "Version of the server.", {"version": self._version}
        )
        if self.snapshot is not None:
            yield from _of_cluster(self.snapshot)
            yield from _of_jobs(self.snapshot.jobs)
            yield from _of_shards(self.snapshot.shards)


def _gauge(
    name: str, text: str, labels: Sequence[str], rows: Mapping[tuple[str, ...], float]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, number in rows.items():
        family.add_metric(values, number)
    return family


def _of_cluster(snapshot: Snapshot) -> Iterator[Metric]:
    cluster = snapshot.cluster
    workers = Tally[tuple[str, ...]]((one.job, one.status) for one in snapshot.workers)
    yield _gauge("adashard_uptime_seconds", "Seconds since the start.", (), {(): cluster.uptime_s})
    yield _gauge(
        "adashard_ready", "1 if the cluster takes work.", (), {(): float(not cluster.not_ready)}
    )
    yield _gauge("adashard_jobs", "Jobs that are known.", (), {(): len(snapshot.jobs)})
    yield _gauge("adashard_workers", "Workers of a job.", ("job_name", "status"), workers)


def _of_jobs(jobs: Sequence[_Job]) -> Iterator[Metric]:
    per_job: dict[str, tuple[str, dict[tuple[str, ...], float]]] = {
        "adashard_global_step": (
            "Steps that the job has decided.",
            {(job.name,): job.version for job in jobs},
        ),
        "adashard_generation": (
            "Generation of the job's membership.",
            {(job.name,): job.generation for job in jobs},
        ),
        "adashard_parameters_bytes": (
            "Bytes of the job's float32 weights on all shards.",
            {(job.name,): job.weight_bytes for job in jobs},
        ),
        "adashard_adam_state_bytes": (
            "Bytes of optimizer state that Adam would hold for the job.",
            {(job.name,): job.adam_bytes for job in jobs},
        ),
    }
    for name, (text, rows) in per_job.items():
        yield _gauge(name, text, ("job_name",), rows)
    yield _gauge(
        "adashard_state_bytes",
        "Bytes of optimizer state on all shards, by kind.",
        ("job_name", "kind"),
        {(job.name, kind): size for job in jobs for kind, size in job.state_bytes.items()},
    )


def _of_shards(shards: Sequence[_Shard]) -> Iterator[Metric]:
    per_shard: dict[str, tuple[str, Callable[[_Shard], float]]] = {
        "adashard_shard_up": (
            "1 if the shard is live or is being drained.",
            lambda shard: float(shard.status in ("live", "draining")),
        ),
        "adashard_shard_renewal_age_seconds": (
            "Seconds since the shard last renewed its lease.",
            lambda shard: shard.renewed_s_ago,
        ),
        "adashard_shard_weight_bytes": (
            "Bytes of weights on the shard, over all jobs.",
            lambda shard: shard.weight_bytes,
        ),
        "adashard_shard_state_bytes": (
            "Bytes of optimizer state on the shard, over all jobs.",
            lambda shard: sum(shard.state_bytes.values()),
        ),
    }
    for name, (text, read) in per_shard.items():
        yield _gauge(name, text, ("shard",), {(str(s.index),): read(s) for s in shards})
    refused = CounterMetricFamily(
        "adashard_shard_refused_reports",
        "Reports of other shards that the shard refused; a few where a generation changes.",
        labels=("shard",),
    )
    for shard in shards:
        refused.add_metric((str(shard.index),), shard.refused_report_count)
    yield refused
