"""The golden trajectories, through shard processes that hold pieces of nearly every tensor."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Iterator, Mapping

import pytest
import torch
import transformers
from tests.golden.trajectories import CONFIGS, RESUME_STEP, RESUMED, TENSORS, Config
from tests.spec.conftest import Bench, Clusters, Feed, tolerance
from tests.spec.crews import Crew, crew_of, same
from torch import Tensor

pytestmark = pytest.mark.processes

SLICE_BYTES = 128
WHOLE = {"vec1", "scalar", "mid1", "row1", "col1", "one11"}
"""Tensors that are not larger than a slice."""

SHARDS = (1, 2, 4)
ONE_WORKER = [name for name in CONFIGS if name != "accumulate_w3"]
IN_FLOAT32 = [name for name in ONE_WORKER if not CONFIGS[name].is_bf16]

IN_EVERY_RUN = ("all_on", "torch_default_eps", "bf16_hf")
"""All but the clamp; the clamp, which takes one more exchange; masters. Others are slow in sum."""

NAMES = {"row": "row_var", "col": "col_var", "v": "variance", "m": "exp_avg"}
"""Kinds of state in the files, and what they are in a state dict."""

Found = Mapping[tuple[str, str, int], Tensor]


def start(config: Config) -> dict[str, Tensor]:
    return {tensor: config.start(tensor) for tensor in TENSORS}


def joined(table: Bench, config: Config, **options) -> Crew:
    """One worker with the model and the settings of a configuration."""
    dtype = torch.bfloat16 if config.is_bf16 else torch.float32
    feed = Feed(start(config), dtype)
    return Crew(table, feed, slice_bytes=SLICE_BYTES, **config.knobs(), **options)


def follow(crew: Crew, config: Config, steps: Iterable[int]) -> Found:
    """Takes the steps: the weights after those of which some are recorded, and the last state."""
    found = {}
    for step in steps:
        crew.step({tensor: config.gradient(tensor, step) for tensor in TENSORS})
        for tensor, weight in crew.weights().items():
            if config.stores(tensor, "x", step):
                found[tensor, "x", step] = weight
    return found | state_of(crew, config)


def state_of(crew: Crew, config: Config) -> Found:
    """The state after the last step, in the shapes of the recorded one."""
    found, entries = {}, crew.optimizers[0].state_dict()["state"]
    for index, tensor in enumerate(TENSORS):
        for kind, name in NAMES.items():
            recorded = config.expected(tensor, kind, config.last_step)
            assert (recorded is not None) == (name in entries[index]), (tensor, kind)
            if recorded is not None:
                found[tensor, kind, config.last_step] = entries[index][name].view(recorded.shape)
    return found


@functools.cache
def followed(clusters: Clusters, name: str, shards: int) -> Found:
    """The whole trajectory on so many shards."""
    config = CONFIGS[name]
    with joined(clusters.bench("processes", shards), config) as crew:
        names = [one.name for one in crew.optimizers[0]._session.spec.parameters]
        assert {names[one.parameter] for one in crew.slices() if not one.split} == WHOLE
        found = follow(crew, config, range(1, config.last_step + 1))
        assert len(crew.shares()) == shards
    return found


def slow_unless(often: bool) -> list[pytest.MarkDecorator]:
    return [] if often else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        pytest.param(name, shards, marks=slow_unless(name in IN_EVERY_RUN))
        for name in IN_FLOAT32
        for shards in SHARDS
    ],
)
def test_a_golden_trajectory_passes_through_shards_that_hold_pieces(clusters, name, shards):
    assert CONFIGS[name].differences(followed(clusters, name, shards)) == []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow_unless(name in IN_EVERY_RUN)) for name in ONE_WORKER]
)
def test_a_golden_trajectory_has_the_same_bits_on_one_two_and_four_shards(clusters, name):
    one, two, four = (followed(clusters, name, shards) for shards in SHARDS)
    assert one
    assert same(one, two)
    assert same(one, four)


# --- stopped and resumed --------------------------------------------------------------------------


def saved_and_loaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow_unless(name in IN_EVERY_RUN)) for name in RESUMED]
)
def test_a_run_that_was_stopped_at_step_ten_goes_on_with_the_same_bits_elsewhere(clusters, name):
    config = CONFIGS[name]
    with joined(clusters.bench("processes", 2), config) as crew:
        follow(crew, config, range(1, RESUME_STEP + 1))
        state, weights = saved_and_loaded(crew.optimizers[0].state_dict()), crew.weights()
    feed, again = Feed(weights, weights["sq"].dtype), clusters.bench("processes", 4)
    with Crew(again, feed, state=state, slice_bytes=SLICE_BYTES, **config.knobs()) as crew:
        found = follow(crew, config, range(RESUME_STEP + 1, config.last_step + 1))
    through = followed(clusters, name, 4)
    assert found
    assert same(found, {key: through[key] for key in found})


# --- several workers, and narrow ones -------------------------------------------------------------

CANCELLING = ("emb", "zgrad")
"""Recorded workers' gradients that add up to zero but for the rounding of their recording.

Adafactor normalises that rest, of 1e-8 of its addends, to a full step, so the recorded weights are
those of a float64 sum. Ours is float32 in rank order: for these two the local optimizer is fed the
same sum.
"""


def followed_alone(config: Config, tensor: str) -> Iterator[tuple[int, Tensor]]:
    """The weights of a local optimizer that is fed the float32 mean in rank order, by step."""
    weight = torch.nn.Parameter(config.start(tensor))
    optimizer = transformers.Adafactor([weight])
    for step in range(1, config.last_step + 1):
        first, *others = config.worker_gradients(tensor, step).float()
        weight.grad = (sum(others, start=first) / (1 + len(others))).double()
        optimizer.step()
        yield step, weight.detach().clone()


@functools.cache
def followed_by_three(clusters: Clusters, shards: int) -> Found:
    config, table = CONFIGS["accumulate_w3"], clusters.bench("processes", shards)
    found = {}
    with crew_of(table, start(config), 3, slice_bytes=SLICE_BYTES) as crew:
        for step in range(1, config.last_step + 1):
            of_workers = {tensor: config.worker_gradients(tensor, step) for tensor in TENSORS}
            crew.step(*({t: of_workers[t][rank] for t in TENSORS} for rank in range(3)))
            found.update({(t, "x", step): weight for t, weight in crew.weights().items()})
    return found


@pytest.mark.parametrize("shards", SHARDS)
def test_the_mean_of_three_workers_follows_its_golden_trajectory(clusters, shards):
    config, found = CONFIGS["accumulate_w3"], followed_by_three(clusters, shards)
    exact = {key: weight for key, weight in found.items() if key[0] not in CANCELLING}
    assert config.differences(exact) == []
    for tensor in CANCELLING:
        for step, expected in followed_alone(config, tensor):
            off = (found[tensor, "x", step].double() - expected).abs().max().item()
            assert off <= tolerance(expected, config.start(tensor), step)
    assert same(found, followed_by_three(clusters, SHARDS[-1]))


def test_a_bf16_worker_holds_the_fp32_trajectory_rounded_once(clusters):
    config = CONFIGS["bf16_hf"]
    feed = Feed(start(config))
    with Crew(clusters.bench("processes", 2), feed, slice_bytes=SLICE_BYTES) as crew:
        masters = follow(crew, config, range(1, config.last_step + 1))
    narrow = followed(clusters, "bf16_hf", 4)
    weights = {key for key in narrow if key[1] == "x"}
    assert all((narrow[key].dtype is torch.bfloat16) == (key in weights) for key in narrow)
    rounded = {key: masters[key].bfloat16() if key in weights else masters[key] for key in masters}
    assert same(narrow, rounded)
