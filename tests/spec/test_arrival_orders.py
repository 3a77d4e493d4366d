"""The same bits whatever order the pushes of three workers arrive in, and in what frames."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.spec.conftest import Clusters
from tests.spec.crews import MODEL, SLICE_BYTES, Crew, crew_of, filled, same
from tests.spec.turnstile import Choose, Turnstile

from adashard_server.shard.early import EarlyRuns

WORKERS, SHARDS, STEPS = 3, 3, 3
SHAPES = {name: MODEL[name] for name in ("vector", "tall", "wide", "scalar")}
OPTIONS = {"slice_bytes": SLICE_BYTES, "beta1": 0.9}


def step(crew: Crew, number: int, ranks: Sequence[int] = range(WORKERS)) -> None:
    crew.step(*(filled(SHAPES, 100 * number + rank + 1) for rank in ranks))


@functools.cache
def in_large_frames_as_they_come(clusters: Clusters):
    """What every order and every border is compared with."""
    with crew_of(clusters.bench("threads", 1), filled(SHAPES, 0), WORKERS, **OPTIONS) as crew:
        for number in range(STEPS):
            step(crew, number)
        return crew.weights()


@contextmanager
def turnstile(*, payload_bytes: int, early_bytes: int) -> Iterator[Turnstile]:
    """A turnstile before all shards of this process, whose frames are small.

    Args:
        payload_bytes: of a frame, at most.
        early_bytes: how much of what comes before its turn a shard keeps. What is beyond waits
            on its way.
    """
    made = Turnstile(waits=early_bytes > 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adashard.wire.frames.PAYLOAD_BYTES_MAX", payload_bytes)
        patch.setattr("adashard.optimizer.GrpcTransport", made.transport)
        patch.setattr("adashard_server.rpc.shard_service.read_frame", made.read)
        patch.setattr("adashard_server.shard.engine.EarlyRuns", lambda: EarlyRuns(early_bytes))
        try:
            yield made
        finally:
            made.open()


def ranks(crew: Crew) -> dict[str, int]:
    return {one._session.id: one.worker_rank for one in crew.optimizers}


def one_after_the_other(crew: Crew, order: tuple[int, ...]) -> Choose:
    """The whole push of one worker, then that of the next."""
    place = {worker: order.index(rank) for worker, rank in ranks(crew).items()}
    return lambda waiting: min(waiting, key=lambda stream: place[stream[0]])


def mixed(crew: Crew, random) -> Choose:
    """Any frame that is there may be the next."""
    rank = ranks(crew)
    return lambda waiting: random.choice(sorted(waiting, key=lambda one: (rank[one[0]], one[1])))


def trained(clusters: Clusters, gate: Turnstile, choose):
    """The weights after all steps, and whose frames passed in the last one, by rank."""
    table = clusters.bench("threads", SHARDS)
    with crew_of(table, filled(SHAPES, 0), WORKERS, **OPTIONS) as crew:
        for number in range(STEPS):
            gate.close(choose(crew))
            step(crew, number)
        gate.open()
        return crew.weights(), [ranks(crew)[worker] for worker, _ in gate.passed]


@pytest.mark.parametrize("order", list(itertools.permutations(range(WORKERS))), ids=str)
def test_pushes_that_arrive_one_after_the_other_may_do_so_in_any_order(clusters, order):
    with turnstile(payload_bytes=160, early_bytes=1 << 20) as gate:
        found, passed = trained(clusters, gate, lambda crew: one_after_the_other(crew, order))
    assert [rank for rank, _ in itertools.groupby(passed)] == list(order)
    assert same(found, in_large_frames_as_they_come(clusters))


@settings(max_examples=3)
@given(random=st.randoms(use_true_random=False), payload_bytes=st.integers(32, 300))
def test_frames_of_three_pushes_may_arrive_mixed_in_any_way(clusters, random, payload_bytes):
    with turnstile(payload_bytes=payload_bytes, early_bytes=1 << 20) as gate:
        found, passed = trained(clusters, gate, lambda crew: mixed(crew, random))
    assert len(passed) > 2 * WORKERS * SHARDS
    assert same(found, in_large_frames_as_they_come(clusters))


def test_pushes_of_the_last_rank_first_wait_on_their_way_where_a_shard_keeps_nothing(clusters):
    with turnstile(payload_bytes=160, early_bytes=0) as gate:
        found, passed = trained(clusters, gate, lambda crew: one_after_the_other(crew, (2, 1, 0)))
    assert [rank for rank, _ in itertools.groupby(passed)] == [2, 1, 0]
    assert same(found, in_large_frames_as_they_come(clusters))


def test_sums_in_another_order_would_be_seen(clusters):
    with crew_of(clusters.bench("threads", 1), filled(SHAPES, 0), WORKERS, **OPTIONS) as crew:
        for number in range(STEPS):
            step(crew, number, ranks=(2, 1, 0))
        assert not same(crew.weights(), in_large_frames_as_they_come(clusters))
