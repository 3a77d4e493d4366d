import re
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adashard_server.telemetry.metrics import PHASES, Metrics, Snapshot
from adashard_server.telemetry.points import StepPoint


def a_snapshot(jobs=("demo",), shards=(0,), workers=2, not_ready=()):
    return Snapshot(
        cluster=SimpleNamespace(uptime_s=12.5, not_ready=not_ready),
        jobs=[
            SimpleNamespace(
                name=name,
                generation=3,
                version=41,
                weight_bytes=4000,
                state_bytes={"row": 10, "column": 20},
                adam_bytes=8000,
            )
            for name in jobs
        ],
        shards=[
            SimpleNamespace(
                index=index,
                status="live" if index == 0 else "silent",
                renewed_s_ago=0.5,
                weight_bytes=4000,
                state_bytes={"row": 10, "column": 20},
                refused_report_count=2,
            )
            for index in shards
        ],
        workers=[SimpleNamespace(job=name, status="live") for name in jobs for _ in range(workers)],
    )


def a_point(step=1, **fields):
    phases = dict.fromkeys(PHASES, 0.02)
    return StepPoint(step=step, time_s=0.0, phase_s=phases, **fields)


@pytest.fixture
def metrics():
    metrics = Metrics("0.1.0")
    metrics.refresh(a_snapshot())
    metrics.observe("demo", a_point(pushed_bytes=7, pulled_bytes=9, gradient_norm=2.5))
    metrics.count_record("adashard.membership", "warning")
    return metrics


def families(metrics):
    return list(text_string_to_metric_families(metrics.render()[0].decode()))


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels)


def test_names_have_the_prefix_base_units_and_one_sentence(metrics):
    found = families(metrics)
    assert len(found) > 20
    for family in found:
        assert re.fullmatch(r"adashard_[a-z_]+", family.name), family.name
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|kib|mib|bits)(_|$)", family.name), (
            f"{family.name} has no base unit"
        )
        assert family.documentation.endswith("."), family.name
        assert family.documentation[0].isupper() or family.documentation[0].isdigit(), family.name


def test_counters_and_only_they_end_in_total(metrics):
    for family in families(metrics):
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name


def test_labels_are_from_a_short_list_and_none_is_per_tensor(metrics):
    allowed = {
        "job_name",
        "shard",
        "status",
        "kind",
        "phase",
        "outcome",
        "version",
        "logger",
        "level",
    }
    for family in families(metrics):
        for sample in family.samples:
            assert set(sample.labels) <= allowed | {"le"}, sample.name


def test_a_step_is_counted(metrics):
    metrics.observe("demo", a_point(2, pushed_bytes=1, pulled_bytes=1, skipped=True))
    assert value(metrics, "adashard_steps_total", job_name="demo", outcome="applied") == 1
    assert value(metrics, "adashard_steps_total", job_name="demo", outcome="skipped") == 1
    assert value(metrics, "adashard_push_bytes_total", job_name="demo") == 8
    assert value(metrics, "adashard_pull_bytes_total", job_name="demo") == 10
    for phase in PHASES:
        labels = {"job_name": "demo", "phase": phase}
        assert value(metrics, "adashard_step_duration_seconds_count", **labels) == 2
        assert value(metrics, "adashard_step_duration_seconds_bucket", le="0.01", **labels) == 0
        assert value(metrics, "adashard_step_duration_seconds_bucket", le="0.025", **labels) == 2


def test_gradients_that_are_not_finite_are_counted_by_worker_and_found_ones_by_step(metrics):
    for step, workers in enumerate([("a", "b"), ("a",), ()], start=2):
        metrics.observe("demo", a_point(step, skipped=True, not_finite_workers=workers))
    assert value(metrics, "adashard_not_finite_gradients_total", job_name="demo") == 4


def test_phases_that_nobody_has_named_make_no_labels(metrics):
    odd = StepPoint(step=2, time_s=0.0, phase_s={"coffee": 3.0})
    metrics.observe("demo", odd)
    assert b"coffee" not in metrics.render()[0]


def test_the_newest_step_is_shown(metrics):
    newest = a_point(
        2,
        gradient_norm=1.5,
        update_rms=0.9,
        clip_ratio=1.2,
        lr_requested=0.1,
        lr_applied=0.01,
        values={"loss": 2.25},
    )
    metrics.observe("demo", newest)
    assert value(metrics, "adashard_gradient_norm", job_name="demo") == 1.5
    assert value(metrics, "adashard_update_rms", job_name="demo") == 0.9
    assert value(metrics, "adashard_update_clip_ratio", job_name="demo") == 1.2
    assert value(metrics, "adashard_learning_rate", job_name="demo", kind="requested") == 0.1
    assert value(metrics, "adashard_learning_rate", job_name="demo", kind="applied") == 0.01
    assert value(metrics, "adashard_loss", job_name="demo") == 2.25


def test_a_step_without_a_loss_leaves_the_last_one(metrics):
    assert value(metrics, "adashard_loss", job_name="demo") is None
    metrics.observe("demo", a_point(2, values={"loss": 2.25}))
    metrics.observe("demo", a_point(3))
    assert value(metrics, "adashard_loss", job_name="demo") == 2.25


def test_the_cluster_is_shown_as_it_was_last_seen(metrics):
    metrics.refresh(a_snapshot(shards=(0, 1), workers=3, not_ready=("waits",)))
    assert value(metrics, "adashard_build_info", version="0.1.0") == 1
    assert value(metrics, "adashard_uptime_seconds") == 12.5
    assert value(metrics, "adashard_ready") == 0
    assert value(metrics, "adashard_workers", job_name="demo", status="live") == 3
    assert value(metrics, "adashard_shard_up", shard="0") == 1
    assert value(metrics, "adashard_shard_up", shard="1") == 0
    assert value(metrics, "adashard_shard_state_bytes", shard="0") == 30
    assert value(metrics, "adashard_shard_refused_reports_total", shard="0") == 2
    assert value(metrics, "adashard_global_step", job_name="demo") == 41
    assert value(metrics, "adashard_generation", job_name="demo") == 3
    assert value(metrics, "adashard_state_bytes", job_name="demo", kind="column") == 20
    assert value(metrics, "adashard_parameters_bytes", job_name="demo") == 4000
    assert value(metrics, "adashard_adam_state_bytes", job_name="demo") == 8000


def test_a_job_that_is_gone_leaves_no_series(metrics):
    metrics.refresh(a_snapshot(jobs=("other",)))
    text = metrics.render()[0].decode()
    assert 'job_name="demo"' not in text
    assert 'job_name="other"' in text


def test_a_shard_that_is_gone_leaves_no_series(metrics):
    metrics.refresh(a_snapshot(shards=()))
    assert b"shard=" not in metrics.render()[0]


def test_a_job_can_be_forgotten_before_the_next_scrape_and_twice(metrics):
    metrics.forget("demo")
    metrics.forget("demo")
    assert value(metrics, "adashard_steps_total", job_name="demo", outcome="applied") is None


def test_names_of_jobs_are_escaped(metrics):
    name = 'a "b"\\ \n {c}'
    metrics.observe(name, a_point())
    (steps,) = [one for one in families(metrics) if one.name == "adashard_steps"]
    assert name in {sample.labels["job_name"] for sample in steps.samples}


def test_lines_of_the_log_are_counted(metrics):
    labels = {"logger": "adashard.membership", "level": "warning"}
    assert value(metrics, "adashard_log_records_total", **labels) == 1


def test_two_registries_do_not_share_series(metrics):
    assert value(Metrics("0.1.0"), "adashard_push_bytes_total", job_name="demo") is None
