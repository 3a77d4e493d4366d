"""Workers below float32: masters stay float32 on the shards, and replies are rounded as asked."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.spec.conftest import Feed
from tests.spec.crews import SLICE_BYTES, Crew, filled, same
from torch import Tensor

SHAPES = {"tall": (24, 5), "vector": (40,), "scalar": ()}
START = {name: value.bfloat16().float() for name, value in filled(SHAPES, 0).items()}
STEPS = 6


def pushed(step: int) -> dict[str, Tensor]:
    """Gradients that bfloat16 and float32 workers have alike."""
    return {name: one.bfloat16().float() for name, one in filled(SHAPES, step + 1).items()}


def trained(table, *dtypes: torch.dtype, **options) -> list[dict[str, Tensor]]:
    """The weights of workers of these formats, after the steps."""
    feeds = [Feed(START, dtype) for dtype in dtypes]
    with Crew(table, *feeds, slice_bytes=SLICE_BYTES, **options) as crew:
        for step in range(STEPS):
            crew.step(*[pushed(step)] * len(feeds))
    return [feed.weights() for feed in feeds]


def rounded(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: weight.to(dtype) for name, weight in weights.items()}


# --- steps that are smaller than the format's ----------------------------------------------------

SMALL_STEP = {"lr": 1e-3, "relative_step": False, "scale_parameter": False}


@pytest.mark.parametrize(
    ("kind", "dtype", "lr"),
    [("processes", torch.bfloat16, 1e-3), ("threads", torch.float16, 1e-4)],
    ids=["bf16", "fp16"],
)
def test_a_weight_of_one_moves_by_steps_that_its_format_cannot_show(clusters, kind, dtype, lr):
    feed, options = Feed({"weight": torch.ones(4)}, dtype), {**SMALL_STEP, "lr": lr}
    with clusters.bench(kind, 1).adafactor(feed.named(), **options) as optimizer:
        for _ in range(200):
            feed.give({"weight": torch.ones(4)})
            optimizer.step()
    here = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    local = transformers.Adafactor([here], **options)
    for _ in range(200):
        here.grad = torch.ones(4, dtype=dtype)
        local.step()
    moved = 1 - feed.weights()["weight"].float()
    assert torch.allclose(moved, torch.tensor(200 * lr), atol=torch.finfo(dtype).eps / 2)
    assert torch.equal(here, torch.ones(4, dtype=dtype))  # what a library makes of the same


# --- formats of workers and of replies -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_workers_of_two_formats_train_one_model(bench, dtype):
    wide, narrow = trained(bench(2), torch.float32, dtype)
    assert same(narrow, rounded(wide, dtype))
    assert not same(wide, rounded(rounded(wide, dtype), torch.float32))


def test_float32_workers_can_have_bf16_replies(bench):
    (asked,) = trained(bench(2), torch.float32, reply_dtype=torch.bfloat16)
    (whole,) = trained(bench(2), torch.float32)
    assert same(asked, rounded(rounded(whole, torch.bfloat16), torch.float32))
    assert not same(asked, whole)


def test_bf16_workers_can_have_float32_replies(bench):
    (asked,) = trained(bench(2), torch.bfloat16, reply_dtype=torch.float32)
    (whole,) = trained(bench(2), torch.float32)
    assert same(asked, rounded(whole, torch.bfloat16))


# --- rounding by chance --------------------------------------------------------------------------

BY_CHANCE = {"rounding": "stochastic", "seed": 5}


def test_stochastic_rounding_has_the_same_bits_for_all_workers_runs_and_shards(clusters, kind):
    table = clusters.bench("threads", 3)
    one, other = trained(table, torch.bfloat16, torch.bfloat16, **BY_CHANCE)
    (again,) = trained(clusters.bench(kind, 1), torch.bfloat16, **BY_CHANCE)
    assert same(one, other)
    assert same(one, again)


def test_another_seed_rounds_in_another_way(bench):
    (one,) = trained(bench(2), torch.bfloat16, **BY_CHANCE)
    (other,) = trained(bench(2), torch.bfloat16, rounding="stochastic", seed=6)
    (nearest,) = trained(bench(2), torch.bfloat16)
    assert not same(one, other)
    assert not same(one, nearest)


def test_stochastic_rounding_gives_a_neighbour_and_the_master_in_the_mean(bench):
    """All masters are 0.999 after a step. The neighbours in bf16 are 1 and 1 - 2^-8.

    The mean of so many has a standard deviation of 2e-5, and nearest would be off by 1e-3.
    """
    start = torch.ones(128, 64)
    feed = Feed({"weight": start}, torch.bfloat16)
    options = {**SMALL_STEP, **BY_CHANCE, "slice_bytes": 4096}
    with bench(2).adafactor(feed.named(), **options) as optimizer:
        feed.give({"weight": start})
        optimizer.step()
    found = feed.weights()["weight"].float()
    assert set(found.unique().tolist()) == {1.0, 1 - 2**-8}
    assert abs(found.mean().item() - 0.999) < 1e-4
