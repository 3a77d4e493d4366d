"""Gradients in fewer bits on the wire: what they come to, on real clusters."""

from __future__ import annotations

import pytest
import torch
from tests.spec.conftest import Feed, rarely_on_processes, together
from tests.spec.crews import crew_of, filled, same
from tests.spec.test_state import assert_same, on_disk
from torch import Tensor

import adashard
from adashard_server import LocalCluster

SHAPES = {"matrix": (70, 90), "wide": (5, 700), "vector": (2500,), "batch": (3, 9, 50), "one": ()}
SLICE_BYTES = 8192  # cuts most of them, some between columns
START = filled(SHAPES, 0)
INT8 = {"wire_dtype": "int8", "slice_bytes": SLICE_BYTES}
STEPS = 8


def gradients(step: int) -> dict[str, Tensor | None]:
    """Those of one step; one tensor has none in every third."""
    return filled(SHAPES, 1 + step) | ({"vector": None} if step % 3 == 0 else {})


def stepped(optimizer: adashard.Adafactor, feed: Feed, steps: range) -> None:
    for step in steps:
        feed.give(gradients(step))
        optimizer.step()


def trained(table, steps: int = STEPS, **options) -> dict[str, Tensor]:
    feed = Feed(START)
    with table.adafactor(feed.named(), **{"slice_bytes": SLICE_BYTES, **options}) as optimizer:
        stepped(optimizer, feed, range(steps))
    return feed.weights()


def residuals(optimizer: adashard.Adafactor) -> dict[int, Tensor]:
    return optimizer.state_dict()["remote"].get("wire", {"residuals": {}})["residuals"]


# --- what is learned -----------------------------------------------------------------------------


@rarely_on_processes
@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16", "int8"])
def test_the_bits_of_a_narrower_format_are_the_same_on_any_number_of_shards(bench, wire_dtype):
    one, *others = (trained(bench(shards), wire_dtype=wire_dtype) for shards in (1, 2, 3))
    assert all(same(one, other) for other in others)
    assert not same(one, trained(bench(1)))


@rarely_on_processes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_on_the_wire_are_those_rounded_to_nearest(bench, dtype):
    found, feed = trained(bench(2), wire_dtype=dtype), Feed(START)
    with bench(1).adafactor(feed.named(), slice_bytes=SLICE_BYTES) as optimizer:
        for step in range(STEPS):
            given = gradients(step)
            feed.give(
                {name: None if g is None else g.to(dtype).float() for name, g in given.items()}
            )
            optimizer.step()
    assert same(found, feed.weights())


@rarely_on_processes
@pytest.mark.parametrize("asked", [None, "float32", "auto"])
def test_gradients_that_travel_as_they_are_change_nothing(bench, asked):
    """Pushes are too small here for "auto" to choose anything else."""
    assert same(trained(bench(2), wire_dtype=asked), trained(bench(2)))


@rarely_on_processes
def test_with_feedback_small_gradients_beside_large_ones_are_learned_from_in_int8(bench):
    """Of a quantum each of them is a hundredth: without a residual none would ever be sent."""
    start = {"weight": torch.zeros(1000)}
    gradient = torch.full((1000,), 1e-2 / 127)
    gradient[0] = 1.0
    options = {"relative_step": False, "lr": 1e-2, "scale_parameter": False, "decay_rate": 0.0}
    feeds = Feed(start), Feed(start)
    for feed, named in zip(feeds, (INT8, {}), strict=True):
        with bench(1).adafactor(feed.named(), **options, **named) as optimizer:
            for _ in range(100):
                feed.give({"weight": gradient})
                optimizer.step()
    narrow, wide = (feed.weights()["weight"] for feed in feeds)
    assert bool((narrow < 0).all())
    assert bool((wide < 0).all())


# --- as if it had never stopped ------------------------------------------------------------------


@rarely_on_processes
@pytest.mark.parametrize("half", [1, 4, 5])
def test_a_run_in_int8_that_is_resumed_has_the_bits_of_one_that_ran_through(bench, half):
    through = Feed(START)
    with bench(2).adafactor(through.named(), **INT8) as optimizer:
        stepped(optimizer, through, range(STEPS))
        expected = residuals(optimizer)
    first = Feed(START)
    with bench(2).adafactor(first.named(), **INT8) as optimizer:
        stepped(optimizer, first, range(half))
        saved = on_disk(optimizer.state_dict())
    second = Feed(first.weights())
    with bench(1).adafactor(second.named(), **INT8) as optimizer:
        optimizer.load_state_dict(saved)
        stepped(optimizer, second, range(half, STEPS))
        assert_same(residuals(optimizer), expected)
    assert same(second.weights(), through.weights())
    assert expected.keys() == set(range(len(SHAPES)))


@rarely_on_processes
def test_a_shard_that_dies_between_steps_changes_no_bit_of_a_run_in_int8(clusters, kind):
    expected, feed = trained(clusters.bench("threads", 1), **INT8), Feed(START)
    with LocalCluster(2, in_process=kind == "threads", spare=False) as cluster:
        named = {"address": cluster.address, "job": "thin", **INT8}
        with adashard.Adafactor(feed.named(), **named) as optimizer:
            stepped(optimizer, feed, range(3))
            cluster.kill_shard(1)
            if kind == "threads":
                cluster.restart_shard(1)
            stepped(optimizer, feed, range(3, STEPS))
    assert same(feed.weights(), expected)


@rarely_on_processes
def test_a_worker_that_joins_anew_begins_without_residuals(bench):
    table, feed = bench(2), Feed(START)
    with table.adafactor(feed.named(), **INT8) as optimizer:
        stepped(optimizer, feed, range(2))
        assert residuals(optimizer)
        optimizer.close()
        feed.give({})
        optimizer.step()
        assert residuals(optimizer) == {}


# --- gradients that are not used -----------------------------------------------------------------

BROKEN = {"vector": torch.full((2500,), torch.nan)}


@rarely_on_processes
def test_a_step_that_another_worker_has_skipped_leaves_residuals_where_they_were(bench):
    with crew_of(bench(2), START, workers=2, nonfinite="skip", **INT8) as crew:
        crew.step(gradients(1), gradients(2))
        before = residuals(crew.optimizers[0])
        crew.step(gradients(3), BROKEN)
        after = residuals(crew.optimizers[0])
        crew.weights()
    assert before.keys() <= after.keys()
    for index, one in after.items():
        was = before.get(index, torch.zeros_like(one))
        assert torch.allclose(one, was, rtol=0, atol=1e-6)
    assert any(bool(one.abs().max() > 1e-4) for one in before.values())


@rarely_on_processes
def test_a_gradient_that_is_refused_leaves_residuals_as_they_were(bench):
    feed = Feed(START)
    with bench(2).adafactor(feed.named(), **INT8) as optimizer:
        stepped(optimizer, feed, range(1, 3))
        before = residuals(optimizer)
        feed.give(BROKEN)
        with pytest.raises(adashard.AdashardError, match="'vector'"):
            optimizer.step()
        assert_same(residuals(optimizer), before)
        optimizer.skip_step()
        assert_same(residuals(optimizer), before)


# --- what else there is in a loop ----------------------------------------------------------------


def scaled(table, factor: float) -> dict[str, Tensor]:
    """Weights after steps whose losses were scaled, and the gradients scaled back."""
    feed = Feed(START)
    scaler = adashard.GradScaler("cpu", init_scale=factor, growth_interval=1000)
    with table.adafactor(feed.named(), **INT8) as optimizer:
        for step in range(1, 5):
            optimizer.zero_grad()
            given = gradients(step)
            used = {name: one for name, one in given.items() if one is not None}
            loss = sum((feed.parameters[name] * one).sum() for name, one in used.items())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return feed.weights()


@rarely_on_processes
def test_loss_scaling_by_a_power_of_two_changes_no_bit_of_int8(bench):
    assert same(scaled(bench(2), 2.0**10), scaled(bench(1), 1.0))


@rarely_on_processes
@pytest.mark.parametrize("reply_dtype", ["bfloat16", torch.float16])
def test_replies_have_a_format_of_their_own(bench, reply_dtype):
    found = trained(bench(2), wire_dtype="int8", reply_dtype=reply_dtype)
    masters = trained(bench(1), wire_dtype="int8")
    dtype = getattr(torch, reply_dtype) if isinstance(reply_dtype, str) else reply_dtype
    assert same(found, {name: one.to(dtype).float() for name, one in masters.items()})


@rarely_on_processes
def test_the_norm_of_int8_gradients_is_bounded_on_the_shards(bench):
    one, other = (trained(bench(shards), wire_dtype="int8", max_grad_norm=0.5) for shards in (1, 3))
    assert same(one, other)
    assert not same(one, trained(bench(1), wire_dtype="int8"))


@rarely_on_processes
def test_workers_of_several_formats_train_one_model(bench):
    formats = ("int8", "bfloat16", None)
    table, feeds = bench(2), [Feed(START) for _ in formats]
    made = [
        table.adafactor(
            feed.named(), slice_bytes=SLICE_BYTES, min_workers=len(formats), wire_dtype=one
        )
        for feed, one in zip(feeds, formats, strict=True)
    ]
    for step in range(1, 4):
        for feed in feeds:
            feed.give(gradients(step))
        together(*(optimizer.step for optimizer in made))
    first, *others = (feed.weights() for feed in feeds)
    assert all(same(first, other) for other in others)
    assert [bool(residuals(optimizer)) for optimizer in made] == [True, False, False]
    together(*(optimizer.close for optimizer in made))
