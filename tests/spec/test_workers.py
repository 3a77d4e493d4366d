"""Workers come, go and die; the job goes on with those that are there."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import textwrap
import threading

import httpx
import pytest
import torch
from tests.spec.conftest import Feed, rarely_on_processes, together

import adashard
from adashard.wire.errors import JobExists, LeaseExpired, ModelMismatch
from adashard_server import LocalCluster


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(6, 5, generator=generator),
        "vector": torch.randn(4, generator=generator),
        "frozen": torch.randn(3, 3, generator=generator),
    }


def gradients(seed: int) -> dict[str, torch.Tensor | None]:
    return {**weights(1000 + seed), "frozen": None}


def step(optimizer, feed, seed: int) -> None:
    feed.give(gradients(seed))
    optimizer.step()


def equal(one: Feed, other: Feed) -> bool:
    ours, theirs = one.weights(), other.weights()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_others_adopt_the_weights_of_the_first_and_drop_their_first_gradient(bench):
    table, feeds = bench(2), [Feed(weights(0)), Feed(weights(1))]
    first, second = (table.adafactor(feed.named(), min_workers=2) for feed in feeds)

    def join_and_adopt():
        table.until(lambda: len(table.workers()) == 1)
        step(second, feeds[1], 0)
        assert second.global_step == 0
        assert equal(feeds[1], Feed(weights(0)))
        step(second, feeds[1], 1)

    together(lambda: step(first, feeds[0], 0), join_and_adopt)
    assert first.global_step == second.global_step == 1
    assert equal(*feeds)
    together(first.close, second.close)


def test_a_worker_that_closes_releases_the_others(bench):
    table, feeds = bench(2), [Feed(weights(0)), Feed(weights(0))]
    stays, leaves = (table.adafactor(feed.named(), min_workers=2) for feed in feeds)
    together(lambda: step(stays, feeds[0], 1), lambda: step(leaves, feeds[1], 2))
    together(leaves.close, lambda: step(stays, feeds[0], 3))
    step(stays, feeds[0], 4)
    assert stays.global_step == 3
    stays.close()


@rarely_on_processes
def test_close_is_idempotent_and_the_job_stays(bench):
    table, feed = bench(1), Feed(weights(0))
    optimizer = table.adafactor(feed.named())
    step(optimizer, feed, 1)
    optimizer.close()
    optimizer.close()
    assert table.get(f"/api/v1/jobs/{table.job}")["step"] == 1


def test_a_killed_worker_releases_the_others(bench):
    table, feed = bench(2), Feed({"weight": torch.ones(3, 2)})
    script = f"""
        import torch, adashard
        weight = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = adashard.Adafactor(
            [("weight", weight)], address={table.cluster.address!r}, job={table.job!r},
            min_workers=2)
        weight.grad = torch.ones(3, 2)
        optimizer.step()
        print("stepped", flush=True)
        input()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    optimizer = table.adafactor(feed.named(), min_workers=2)
    try:
        feed.give({"weight": torch.ones(3, 2)})
        optimizer.step()
        assert child.stdout.readline() == "stepped\n"
        child.send_signal(signal.SIGKILL)
        together(optimizer.step)
        assert optimizer.global_step == 2
    finally:
        child.kill()
        child.communicate()
        optimizer.close()


def test_a_worker_that_joins_later_adopts_the_weights_and_takes_part(bench):
    table, early, late = bench(2), Feed(weights(0)), Feed(weights(7))
    old, new = table.adafactor(early.named()), table.adafactor(late.named())
    seen, left = {}, threading.Event()

    def go_on():
        for seed in itertools.count():
            step(old, early, seed)
            seen[old.global_step] = early.weights()
            if left.is_set():
                return

    def take_part():
        table.until(lambda: len(seen) >= 2)
        step(new, late, 100)  # adopts
        joined_at = new.global_step
        step(new, late, 101)
        assert new.global_step == joined_at + 1
        new.close()
        left.set()
        return joined_at

    _, joined_at = together(go_on, take_part)
    assert joined_at >= 2
    assert all(torch.equal(seen[joined_at + 1][name], now) for name, now in late.weights().items())
    old.close()


def test_a_parameter_without_any_gradient_takes_no_part(bench):
    table, feed = bench(2), Feed(weights(0))
    before = feed.weights()
    with table.adafactor(feed.named(), weight_decay=0.1) as optimizer:
        step(optimizer, feed, 0)
        after = feed.weights()
        assert torch.equal(after["frozen"], before["frozen"])
        assert not torch.equal(after["matrix"], before["matrix"])


def test_a_zero_gradient_is_not_an_absent_one(bench):
    table, feed = bench(2), Feed(weights(0))
    before = feed.weights()
    with table.adafactor(feed.named(), weight_decay=0.1) as optimizer:
        feed.give({**gradients(0), "frozen": torch.zeros(3, 3)})
        optimizer.step()
        assert (feed.weights()["frozen"].abs() < before["frozen"].abs()).all()


def test_a_gradient_that_one_worker_lacks_counts_as_zero_in_the_mean(bench):
    feeds, table = [Feed(weights(0)), Feed(weights(0))], bench(2)
    one, other = (table.adafactor(feed.named(), min_workers=2) for feed in feeds)
    feeds[0].give({"matrix": torch.ones(6, 5)})
    feeds[1].give({"vector": torch.ones(4)})
    together(one.step, other.step)
    together(one.close, other.close)
    alone = Feed(weights(0))
    with bench(1).adafactor(alone.named()) as optimizer:
        alone.give({"matrix": torch.full((6, 5), 0.5), "vector": torch.full((4,), 0.5)})
        optimizer.step()
    assert equal(feeds[0], alone)
    assert equal(feeds[1], alone)


def test_a_script_that_is_run_again_joins_where_the_job_stands(bench, caplog):
    table, first = bench(2), Feed(weights(0))
    with table.adafactor(first.named()) as optimizer:
        for seed in range(3):
            step(optimizer, first, seed)
    again = Feed(weights(5))
    with caplog.at_level("INFO", "adashard"), table.adafactor(again.named()) as optimizer:
        step(optimizer, again, 0)
        assert optimizer.global_step == 3
        assert equal(first, again)
        step(optimizer, again, 3)
        assert optimizer.global_step == 4
    assert "exists: joining it at step 3" in caplog.text


def test_on_existing_replace_begins_anew_and_error_refuses(bench):
    table, first = bench(2), Feed(weights(0))
    with table.adafactor(first.named()) as optimizer:
        step(optimizer, first, 0)
        intruder = Feed(weights(3))
        replacing = table.adafactor(intruder.named(), on_existing="replace")
        with pytest.raises(JobExists, match="1 live workers"):
            step(replacing, intruder, 0)
    refused = table.adafactor(Feed(weights(3)).named(), on_existing="error")
    with pytest.raises(JobExists, match="at step 1"):
        refused.step()
    other = Feed({"other": torch.randn(4, 4)})
    with table.adafactor(other.named(), on_existing="replace") as optimizer:
        before = other.weights()
        other.give({"other": torch.ones(4, 4)})
        optimizer.step()
        assert optimizer.global_step == 1
        assert not torch.equal(before["other"], other.weights()["other"])


def test_a_worker_with_another_model_is_told_the_first_difference(bench):
    table, feed = bench(1), Feed(weights(0))
    with table.adafactor(feed.named()) as optimizer:
        step(optimizer, feed, 0)
        other = {**weights(0), "vector": torch.randn(9)}
        with pytest.raises(ModelMismatch, match=r"'vector'.*\(9,\).*\(4,\)"):
            table.adafactor(Feed(other).named()).step()
        step(optimizer, feed, 1)
        assert optimizer.global_step == 2


@rarely_on_processes
def test_more_shards_than_parameters_work(bench):
    table, feed = bench(4), Feed({"only": torch.ones(4, 4)})
    with table.adafactor(feed.named()) as optimizer:
        feed.give({"only": torch.ones(4, 4)})
        optimizer.step()
        assert optimizer.global_step == 1
        assert not torch.equal(feed.weights()["only"], torch.ones(4, 4))


def test_a_step_that_is_not_finite_is_skipped_by_all_shards(bench):
    table, feed = bench(2), Feed(weights(0))
    with table.adafactor(feed.named(), nonfinite="skip") as optimizer:
        step(optimizer, feed, 0)
        before = feed.weights()
        feed.give({**gradients(1), "vector": torch.tensor([1.0, float("nan"), 1.0, 1.0])})
        optimizer.step()
        assert optimizer.global_step == 2
        assert all(torch.equal(before[name], now) for name, now in feed.weights().items())
        step(optimizer, feed, 2)
        assert not torch.equal(before["matrix"], feed.weights()["matrix"])


def test_parameters_that_are_not_laid_out_row_by_row_are_written_in_place(bench):
    base = torch.randn(5, 6)
    table, plain, turned = bench(1), Feed({"w": base}), Feed({"w": base})
    turned.parameters["w"].data = base.t().contiguous().t()
    for feed in (plain, turned):
        with bench(1).adafactor(feed.named()) as optimizer:
            feed.give({"w": base * 2})
            optimizer.step()
    assert not turned.parameters["w"].is_contiguous()
    assert equal(plain, turned)
    del table


def test_a_session_that_has_ended_joins_anew_at_the_next_step(bench):
    table, feed = bench(1), Feed(weights(0))
    optimizer = table.adafactor(feed.named())
    step(optimizer, feed, 0)
    optimizer._session.abandon()
    with pytest.raises(LeaseExpired):
        step(optimizer, feed, 1)
    step(optimizer, feed, 1)
    assert optimizer.global_step >= 1
    optimizer.close()


@rarely_on_processes
def test_slice_bytes_are_the_clusters_where_a_job_leaves_them_open(kind):
    with LocalCluster(1, slice_bytes=1 << 16, in_process=kind == "threads") as cluster:
        for job, own in {"open": None, "own": 1 << 20}.items():
            feed = Feed(weights(0))
            options = {"address": cluster.address, "job": job, "slice_bytes": own}
            with adashard.Adafactor(feed.named(), **options) as optimizer:
                step(optimizer, feed, 0)
            told = httpx.get(f"{cluster.url}/api/v1/jobs/{job}", trust_env=False).json()
            assert told["slice_bytes"] == (own or 1 << 16)


def test_a_worker_talks_to_more_shards_at_once_than_it_has_cores():
    start = {f"weight {index}": torch.ones(2, 2) for index in range(12)}
    with LocalCluster(12, in_process=True) as cluster:
        feed = Feed(start)
        with adashard.Adafactor(feed.named(), address=cluster.address) as optimizer:
            feed.give(start)
            together(optimizer.step)
            assert optimizer.global_step == 1
