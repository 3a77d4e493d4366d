"""Gradients that are sparse in rows, as embeddings have them, have the bits of dense ones."""

from __future__ import annotations

import pytest
import torch
from tests.spec.conftest import Bench, Feed, rarely_on_processes
from tests.spec.crews import SLICE_BYTES, Crew
from torch import Tensor, nn

import adashard
from adashard.wire.errors import InvalidGradient

STEPS = 6
BY_ROWS, BY_COLUMNS = (40, 6), (6, 40)


class Table(Feed):
    """An embedding that is fed rows to look up, some of them often, and trained on a loss."""

    def __init__(self, shape: tuple[int, int], *, sparse: bool, bag: bool = False) -> None:
        torch.manual_seed(3)
        bags = {"mode": "sum"} if bag else {}
        self.module = (nn.EmbeddingBag if bag else nn.Embedding)(*shape, sparse=sparse, **bags)
        self.parameters = dict(self.module.named_parameters())

    def give(self, gradients: Tensor | dict) -> None:
        self.module.zero_grad()
        found = self.module(gradients)
        (found * torch.linspace(-1, 2, found.shape[-1])).square().sum().backward()
        assert self.module.weight.grad.is_sparse == self.module.sparse


def looked_up(step: int, worker: int, row_count: int) -> Tensor:
    """Rows of one batch: the last two never, one of them in three places."""
    generator = torch.Generator().manual_seed(10 * step + worker)
    rows = torch.randint(row_count - 2, (4, 2), generator=generator)
    return torch.cat([rows, rows[:1, :1].expand(1, 2)])


def trained(bench: Bench, *tables: Table, **options) -> Tensor:
    """The weights that all workers have after the steps; each has a table."""
    row_count = tables[0].module.weight.shape[0]
    with Crew(bench, *tables, slice_bytes=SLICE_BYTES, **options) as crew:
        assert crew.slices()[0].split
        for step in range(STEPS):
            crew.step(*(looked_up(step, rank, row_count) for rank in range(len(tables))))
        return crew.weights()["weight"]


@pytest.mark.parametrize("shape", [BY_ROWS, BY_COLUMNS], ids=["cut by rows", "cut by columns"])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("bag", [False, True], ids=["Embedding", "EmbeddingBag"])
def test_a_table_with_sparse_gradients_has_the_bits_of_one_with_dense_ones(
    clusters, shape, shards, bag
):
    sparse, dense = (Table(shape, sparse=one, bag=bag) for one in (True, False))
    begun = dense.weights()["weight"]
    found = trained(clusters.bench("processes", shards), sparse, beta1=0.9, weight_decay=0.1)
    expected = trained(clusters.bench("threads", 1), dense, beta1=0.9, weight_decay=0.1)
    assert torch.equal(found, expected)
    assert not torch.equal(expected[:-2], begun[:-2])


@pytest.mark.parametrize("shape", [BY_ROWS, BY_COLUMNS], ids=["cut by rows", "cut by columns"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_worker_with_sparse_gradients_may_train_beside_one_with_dense_ones(
    clusters, shape, shards
):
    def run(*sparse: bool) -> Tensor:
        tables = [Table(shape, sparse=one) for one in sparse]
        return trained(clusters.bench("threads", shards), *tables, max_grad_norm=1.0)

    assert torch.equal(run(True, False), run(False, False))


@rarely_on_processes
def test_only_rows_that_were_looked_up_travel(bench):
    table, own = Table(BY_ROWS, sparse=True), bench(2)
    with Crew(own, table, slice_bytes=SLICE_BYTES) as crew:
        crew.step(torch.tensor([[3, 3], [17, 30]]))

        def pushed() -> list[int]:
            items = own.get(f"/api/v1/jobs/{own.job}/steps")["items"]
            return [item["pushed_bytes"] for item in items if item["step"] == 2]

        own.until(pushed)
        assert pushed() == [3 * 6 * 4]  # three rows of six numbers of four bytes


@pytest.mark.parametrize("row", [40, 4000, -1])
def test_a_row_that_the_parameter_has_not_is_named_and_nothing_is_sent(bench, row):
    own, feed = bench(2), Feed({"table": torch.ones(40, 6)})
    optimizer = own.adafactor(feed.named())
    with optimizer:
        feed.give({"table": torch.ones(40, 6)})
        optimizer.step()
        before = feed.weights()["table"]
        feed.parameters["table"].grad = torch.sparse_coo_tensor(
            [[3, row]], torch.ones(2, 6), (40, 6), check_invariants=False
        )
        with pytest.raises(InvalidGradient, match=rf"'table' has a row {row}.* 40 rows") as raised:
            optimizer.step()
        assert raised.value.facts["tensor"] == "table"
        assert int(raised.value.facts["index"]) == row
        assert torch.equal(feed.weights()["table"], before)
        feed.give({"table": torch.ones(40, 6)})
        optimizer.step()
        assert optimizer.global_step == 2


def test_a_gradient_that_is_sparse_in_more_than_rows_is_refused_before_anything_is_sent():
    weight = nn.Parameter(torch.ones(5, 3))
    optimizer = adashard.Adafactor([("weight", weight)])
    weight.grad = torch.ones(5, 3).to_sparse()
    with pytest.raises(InvalidGradient, match=r"'weight' is torch.sparse_coo over 2 axes"):
        optimizer.step()
    assert optimizer._session is None
