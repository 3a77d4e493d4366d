"""The same bits at any number of shards, however the model is cut between them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.spec.conftest import Bench, Clusters
from tests.spec.crews import MODEL, SLICE_BYTES, crew_of, filled, same
from torch import Tensor

STEPS = 20
ALL_ON = {
    "lr": 5e-3,
    "relative_step": False,
    "beta1": 0.9,
    "weight_decay": 0.05,
    "clip_threshold": 0.8,
    "max_grad_norm": 0.5,
}


def trained(
    table: Bench,
    shapes: dict[str, tuple[int, ...]],
    workers: int,
    *,
    check: Callable[..., None] = lambda crew: None,
    **options: Any,
) -> dict[str, Tensor]:
    """The weights after the steps, which all workers hold."""
    with crew_of(table, filled(shapes, 0), workers, **options) as crew:
        for step in range(STEPS):
            crew.step(*(filled(shapes, 100 * step + worker + 1) for worker in range(workers)))
        check(crew)
        return crew.weights()


@functools.cache
def on_one_shard(clusters: Clusters) -> dict[str, Tensor]:
    """What every other number of shards is compared with."""
    return trained(clusters.bench("threads", 1), MODEL, 2, slice_bytes=SLICE_BYTES, **ALL_ON)


@pytest.mark.parametrize(
    ("kind", "shards"),
    [*(("threads", shards) for shards in (2, 3, 4, 8)), ("processes", 4)],
)
def test_a_model_that_is_cut_has_the_same_bits_on_any_number_of_shards(clusters, kind, shards):
    def all_is_cut_and_every_shard_has_its_part(crew):
        assert {piece.parameter for piece in crew.slices() if not piece.split} == {len(MODEL) - 1}
        assert len(crew.shares()) == shards

    found = trained(
        clusters.bench(kind, shards),
        MODEL,
        2,
        check=all_is_cut_and_every_shard_has_its_part,
        slice_bytes=SLICE_BYTES,
        **ALL_ON,
    )
    assert same(found, on_one_shard(clusters))


SHAPES = st.one_of(
    st.tuples(st.integers(1, 60)),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.tuples(*[st.integers(1, 5)] * 3),
    st.tuples(*[st.integers(1, 4)] * 4),
    st.just(()),
)
RELATIVE = st.fixed_dictionaries({"semantics": st.sampled_from(["paper", "torch"])})
NOT_RELATIVE = st.fixed_dictionaries(
    {
        "lr": st.just(3e-3),
        "relative_step": st.just(False),
        "semantics": st.sampled_from(["transformers-trainer", "optax"]),
        "min_dim_size_to_factor": st.sampled_from([1, 4]),
        "scale_parameter": st.booleans(),
    }
)
OTHERS = st.fixed_dictionaries(
    {
        "factored_axes": st.sampled_from(["last_two", "largest_two"]),
        "beta1": st.sampled_from([None, 0.9]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "max_grad_norm": st.sampled_from([None, 0.1, 1e6]),
    }
)


@settings(max_examples=4)  # each takes forty steps through real servers
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=3),
    pieces=st.integers(1, 8),
    workers=st.integers(1, 4),
    shards=st.sampled_from([2, 3, 4, 8]),
    steps=st.one_of(RELATIVE, NOT_RELATIVE),
    others=OTHERS,
)
def test_any_model_cut_in_any_way_has_the_same_bits_on_any_number_of_shards(
    clusters, shapes, pieces, workers, shards, steps, others
):
    named = {str(index): shape for index, shape in enumerate(shapes)}
    largest = max(map(math.prod, shapes))
    options = {**steps, **others, "slice_bytes": max(SLICE_BYTES, 4 * largest // pieces)}
    one, many = (
        trained(clusters.bench("threads", count), named, workers, **options)
        for count in (1, shards)
    )
    assert same(one, many)
    assert not same(one, filled(named, 0))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_rows_of_unequal_scale_make_no_difference_between_one_shard_and_four(clusters, kind):
    """A matrix on which servers that factor every piece by itself are off by 70 % of the update.

    It is cut by rows. The first half of these is ten times as large as the second, and their
    gradients grow from the first to the last.
    """
    generator = torch.Generator().manual_seed(0)
    unequal = torch.cat([torch.full((128, 1), 10.0), torch.ones(128, 1)])
    growing = 1 + torch.arange(256).unsqueeze(1) / 64
    start = {"matrix": torch.randn(256, 128, generator=generator) * unequal}
    pushed = [{"matrix": torch.randn(256, 128, generator=generator) * growing} for _ in range(5)]

    def stepped(shards: int) -> Tensor:
        options = {"slice_bytes": 16 << 10, "lr": 0.01, "relative_step": False}
        with crew_of(clusters.bench(kind, shards), start, **options) as crew:
            assert [piece.shape for piece in crew.slices()] == [(32, 128)] * 8
            assert len(crew.shares()) == shards
            for gradients in pushed:
                crew.step(gradients)
            return crew.weights()["matrix"]

    one, four = stepped(1), stepped(4)
    assert (one - four).abs().max() == 0.0
    assert (one - start["matrix"]).abs().max() > 0.01
