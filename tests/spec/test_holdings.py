"""What REST tells of a job whose parameters are cut: every byte once, wherever it lies."""

from __future__ import annotations

import pytest
from tests.spec.crews import SLICE_BYTES, crew_of, filled

SHAPES = {"tall": (24, 5), "vector": (40,), "scalar": ()}
HELD = {
    "row": 4 * 24,
    "column": 4 * 5 * 8,  # each of eight slices has all five
    "vector": 4 * (40 + 1),
    "momentum": 4 * (24 * 5 + 40 + 1),
}


@pytest.mark.parametrize("shards", [1, 4])
def test_the_bytes_of_cut_parameters_are_told_whole_at_any_number_of_shards(bench, shards):
    table, start = bench(shards), filled(SHAPES, 0)
    with crew_of(table, start, slice_bytes=SLICE_BYTES, beta1=0.9) as crew:
        crew.step(start)
        path = f"/api/v1/jobs/{table.job}"
        table.until(lambda: table.get(path)["state_bytes"] == sum(HELD.values()))
        job, state = table.get(path), table.get(f"{path}/state")
    assert (job["slice_count"], job["slice_bytes"]) == (8 + 4 + 1, SLICE_BYTES)
    assert state["by_kind"] == HELD
    assert state["total_bytes"] == sum(state["by_shard"].values()) == sum(HELD.values())
    assert len(state["by_shard"]) == shards
    assert min(state["by_shard"].values()) > 0
    assert job["weight_bytes"] == state["weight_bytes"] == 4 * (24 * 5 + 40 + 1)
    assert state["adam_bytes"] == 2 * job["weight_bytes"]
