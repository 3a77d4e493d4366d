"""Gradients of no use on one of several workers: the others go on, and people hear why."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator

import httpx
import pytest
import torch
from tests.spec.conftest import Bench, Feed, rarely_on_processes, together
from tests.spec.crews import crew_of, filled, same

import adashard
from adashard.wire.errors import Evicted, NotFinite

START = filled({"matrix": (6, 5), "vector": (4,)}, 0)
BROKEN = {**filled({"matrix": (6, 5)}, 1), "vector": torch.tensor([1.0, torch.nan, 1.0, 1.0])}


def gradients(seed: int) -> dict[str, torch.Tensor]:
    return filled({"matrix": (6, 5), "vector": (4,)}, 100 + seed)


def events(table: Bench, *, until: str) -> Iterator[dict]:
    """The job's events from its first, as they come, up to the first of this name."""
    url = f"{table.cluster.url}/api/v1/events?job={table.job}&after=0"
    with httpx.stream("GET", url, trust_env=False) as answer:
        for line in answer.iter_lines():
            told = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if "facts" in told:
                yield told
            if told.get("name") == until:
                return


@rarely_on_processes
def test_a_worker_whose_scaler_overflows_does_not_stop_the_others(bench):
    """They step on the mean in which its gradient is zero, and it takes their weights."""
    table, feeds = bench(2), [Feed(START), Feed(START)]
    steps, overflows = 3, 3

    def train(feed: Feed, factors: list[float]) -> None:
        scaler = adashard.GradScaler("cpu")
        with table.adafactor(feed.named(), min_workers=2) as optimizer:
            for factor in factors:
                optimizer.zero_grad()
                loss = sum((factor * one).sum() for one in feed.parameters.values())
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            assert optimizer.global_step == steps

    together(
        lambda: train(feeds[0], [2.0] * steps),
        lambda: train(feeds[1], [torch.inf] * overflows),
    )
    assert same(feeds[0].weights(), feeds[1].weights())
    alone = Feed(START)
    with bench(1).adafactor(alone.named()) as optimizer:
        for _ in range(steps):
            alone.give({name: torch.ones_like(one) for name, one in START.items()})
            optimizer.step()
    assert same(feeds[0].weights(), alone.weights())


def test_a_worker_that_says_so_has_all_skip_the_step_and_is_named_with_its_tensors(bench):
    table = bench(2)
    with crew_of(table, START, workers=2, nonfinite="skip") as crew:
        crew.step(gradients(0), gradients(1))
        before = crew.weights()
        crew.step(gradients(2), BROKEN)
        assert same(before, crew.weights())
        crew.step(gradients(3), gradients(4))
        found = crew.weights()
        culprit = crew.optimizers[1]._session.id
        *_, event = events(table, until="not_finite")
    assert event["facts"] == {"step": "3", "workers": culprit, "parameters": "'vector'"}
    with crew_of(bench(2), START, workers=2) as crew:
        crew.step(gradients(0), gradients(1))
        crew.step(gradients(3), gradients(4))
        assert same(found, crew.weights())


def test_a_worker_that_refuses_its_gradient_holds_the_round_and_may_push_a_better_one(bench):
    with crew_of(bench(2), START, workers=2) as crew:
        one, other = crew.optimizers
        refused = threading.Event()

        def mend() -> None:
            crew.feeds[1].give(BROKEN)
            with pytest.raises(NotFinite, match="'vector'"):
                other.step()
            refused.set()
            crew.feeds[1].give(gradients(1))
            other.step()

        crew.feeds[0].give(gradients(0))
        together(one.step, mend)
        assert refused.is_set()
        found = crew.weights()
    with crew_of(bench(1), START, workers=2) as crew:
        crew.step(gradients(0), gradients(1))
        assert same(found, crew.weights())


def test_a_worker_that_goes_on_sending_poison_is_evicted_and_reads_why(bench):
    table = bench(2)
    crew = crew_of(table, START, workers=2, nonfinite="skip")
    stays, goes = crew.optimizers
    gone = threading.Event()

    def poison() -> None:
        try:
            for _ in itertools.count():
                crew.feeds[1].give(BROKEN)
                goes.step()
        finally:
            gone.set()

    def go_on() -> None:
        while not gone.is_set():
            crew.feeds[0].give(gradients(0))
            stays.step()
        before = crew.feeds[0].weights()
        stays.step()
        assert not same(before, crew.feeds[0].weights())

    with pytest.raises(Evicted, match=r"3 steps of job .* in a row.*'vector'"):
        together(go_on, poison)
    names = [event["name"] for event in events(table, until="evicted")]
    assert names.count("not_finite") == 1
    stays.close()
