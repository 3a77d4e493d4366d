"""A job goes on from its saved state as if it had never stopped, here and in the libraries."""

from __future__ import annotations

import io

import pytest
import torch
import transformers
from tests.golden.trajectories import CONFIGS, RESUME_STEP, RESUMED, TENSORS
from tests.spec.conftest import Feed, together

from adashard.wire.errors import JobExists, ModelMismatch

SHAPES = {"matrix": (37, 21), "vector": (50,), "batch": (3, 5, 8), "wide": (5, 48), "scalar": ()}
SLICE_BYTES = 256  # cuts all but the scalar and the vector


def start() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def gradients(step: int, of: int = 0) -> dict[str, torch.Tensor | None]:
    """Those of one step and worker; the scalar has none in every third."""
    generator = torch.Generator().manual_seed(100 * step + of)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return found | ({"scalar": None} if step % 3 == 0 else {})


def stepped(optimizer, feed: Feed, steps: range) -> None:
    for step in steps:
        feed.give(gradients(step))
        optimizer.step()


def on_disk(state_dict: dict) -> dict:
    """The dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def split(table, feed: Feed, **options):
    """An optimizer whose parameters are cut into slices."""
    return table.adafactor(feed.named(), slice_bytes=SLICE_BYTES, **options)


# --- as if it had never stopped ------------------------------------------------------------------

KINDS = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16, rounded stochastically": (torch.bfloat16, {"rounding": "stochastic", "seed": 7}),
    "bf16 replies": (torch.float32, {"reply_dtype": torch.bfloat16}),
    "fp16 with a first moment": (torch.float16, {"beta1": 0.9}),
    "torch": (torch.float32, {"semantics": "torch"}),
}


@pytest.fixture(params=["threads", pytest.param("processes", marks=pytest.mark.slow)])
def kind(request) -> str:
    """Processes only among the slow tests: what differs on them, other files look at."""
    return request.param


@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_is_resumed_has_the_bits_of_one_that_ran_through(bench, name, shards):
    dtype, options = KINDS[name]
    through = Feed(start(), dtype)
    with split(bench(shards), through, **options) as optimizer:
        stepped(optimizer, through, range(1, 21))
        expected = optimizer.state_dict()
    first = Feed(start(), dtype)
    with split(bench(shards), first, **options) as optimizer:
        stepped(optimizer, first, range(1, 11))
        saved = on_disk(optimizer.state_dict())
    second = Feed(first.weights(), dtype)
    with split(bench(3 - shards), second, **options) as optimizer:
        optimizer.load_state_dict(saved)
        stepped(optimizer, second, range(11, 21))
        assert optimizer.global_step == 20
        found = optimizer.state_dict()
    for tensor, weight in through.weights().items():
        assert torch.equal(second.weights()[tensor], weight), tensor
    assert_same(found["state"], expected["state"])
    assert_same(found["remote"]["masters"], expected["remote"]["masters"])


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[key], value)
        else:
            assert torch.equal(found[key], value), key


def test_loading_into_a_library_and_back_keeps_every_bit(bench):
    feed = Feed(start())
    with split(bench(2), feed) as optimizer:
        stepped(optimizer, feed, range(1, 4))
        saved = optimizer.state_dict()
        to_transformers = optimizer.state_dict(to_transformers=True)
    for library, given in (
        (torch.optim.Adafactor, saved),
        (transformers.Adafactor, to_transformers),
    ):
        between = library(list(Feed(start()).parameters.values()))
        between.load_state_dict(given)
        again = split(bench(1), feed)
        again.load_state_dict(on_disk(between.state_dict()))
        assert_same(again.state_dict()["state"], saved["state"])


def test_a_job_that_still_stands_where_it_was_saved_is_gone_on_with(bench):
    """Its state is what was saved, so there is nothing to begin anew."""
    table, feed = bench(2), Feed(start())
    with split(table, feed) as optimizer:
        stepped(optimizer, feed, range(1, 6))
        saved = optimizer.state_dict()
    again = Feed(feed.weights())
    with split(table, again) as optimizer:
        optimizer.load_state_dict(saved)
        stepped(optimizer, again, range(6, 8))
        assert optimizer.global_step == 7
    through = Feed(start())
    with split(bench(2), through) as optimizer:
        stepped(optimizer, through, range(1, 8))
    for tensor, weight in through.weights().items():
        assert torch.equal(again.weights()[tensor], weight), tensor


# --- the recorded trajectories -------------------------------------------------------------------


def fed(config, optimizer, feed: Feed, steps: range) -> None:
    for step in steps:
        feed.give({tensor: config.gradient(tensor, step) for tensor in TENSORS})
        optimizer.step()


def golden_feed(config) -> Feed:
    return Feed({tensor: config.start(tensor) for tensor in TENSORS})


FOLLOWERS = {
    "torch_default_eps": torch.optim.Adafactor,
    "wd_lr": torch.optim.Adafactor,
    "paper_default": transformers.Adafactor,
    "warmup_init": transformers.Adafactor,
    "all_on": transformers.Adafactor,
}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_a_library_goes_on_from_our_dict_along_the_recorded_trajectory(bench, name):
    config, library = CONFIGS[name], FOLLOWERS[name]
    feed = golden_feed(config)
    with bench(2).adafactor(feed.named(), slice_bytes=64, **config.knobs()) as optimizer:
        fed(config, optimizer, feed, range(1, 11))
        saved = optimizer.state_dict(to_transformers=library is transformers.Adafactor)
    local = Feed(feed.weights(), torch.float64)
    follower = library(list(local.parameters.values()))
    follower.load_state_dict(on_disk(saved))
    fed(config, follower, local, range(11, config.last_step + 1))
    step = config.last_step
    assert config.differences({(t, "x", step): x for t, x in local.weights().items()}) == []


RESUMED_IN_FULL = [name for name in RESUMED if not CONFIGS[name].is_bf16]
TRANSFORMERS_NAMES = {
    "row": "exp_avg_sq_row",
    "col": "exp_avg_sq_col",
    "v": "exp_avg_sq",
    "m": "exp_avg",
}


@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", RESUMED_IN_FULL)
def test_a_recorded_state_is_gone_on_from_along_its_trajectory(bench, name, shards):
    config = CONFIGS[name]
    feed = Feed({t: config.expected(t, "x", RESUME_STEP) for t in TENSORS})
    recorded = transformers.Adafactor(list(feed.parameters.values())).state_dict()
    for index, tensor in enumerate(TENSORS):
        recorded["state"][index] = {"step": RESUME_STEP, "RMS": 0.0} | {
            key: config.expected(tensor, kind, RESUME_STEP).float()
            for kind, key in TRANSFORMERS_NAMES.items()
            if config.stores(tensor, kind, RESUME_STEP)
        }
    knobs = {key: value for key, value in config.knobs().items() if value is not None}
    recorded["param_groups"][0].update(knobs)
    with bench(shards).adafactor(feed.named(), slice_bytes=64, **config.knobs()) as optimizer:
        optimizer.load_state_dict(recorded)
        fed(config, optimizer, feed, range(RESUME_STEP + 1, config.last_step + 1))
    step = config.last_step
    assert config.differences({(t, "x", step): x for t, x in feed.weights().items()}) == []


# --- several workers -----------------------------------------------------------------------------


def saved_at(table, steps: int) -> tuple[dict, dict[str, torch.Tensor]]:
    feed = Feed(start())
    with split(table, feed) as optimizer:
        stepped(optimizer, feed, range(1, steps + 1))
        return optimizer.state_dict(), feed.weights()


@pytest.mark.parametrize("who", ["both", "the first", "the second"])
def test_workers_go_on_together_whoever_of_them_has_loaded_the_state(bench, who):
    saved, weights = saved_at(bench(2), 10)
    table = bench(2)
    feeds = [Feed(weights) for _ in range(2)]
    optimizers = [split(table, feed, min_workers=2) for feed in feeds]
    loads = {"both": (0, 1), "the first": (0,), "the second": (1,)}[who]
    for index in loads:
        optimizers[index].load_state_dict(saved)
    for step in range(11, 14):
        for feed in feeds:
            feed.give(gradients(step))
        together(*(optimizer.step for optimizer in optimizers))
    assert [optimizer.global_step for optimizer in optimizers] == [13, 13]
    for optimizer in optimizers:
        assert optimizer.state_dict()["remote"]["version"] == 13
    together(*(optimizer.close for optimizer in optimizers))
    alone = Feed(start())
    with split(bench(2), alone) as optimizer:
        stepped(optimizer, alone, range(1, 14))
    for tensor, weight in alone.weights().items():  # the mean of two equal gradients is exact
        assert torch.equal(feeds[0].weights()[tensor], weight), tensor
        assert torch.equal(feeds[1].weights()[tensor], weight), tensor


def test_saving_waits_for_no_worker_and_none_for_it(bench):
    """One of two workers saves while the other's next push is under way."""
    table = bench(2)
    feeds = [Feed(start()) for _ in range(2)]
    first, second = [split(table, feed, min_workers=2) for feed in feeds]
    for feed in feeds:
        feed.give(gradients(1))
    together(first.step, second.step)

    def saves_and_steps() -> dict:
        found = first.state_dict()
        first.step()
        return found

    saved, _ = together(saves_and_steps, second.step)
    assert saved["remote"]["version"] == 1
    assert {int(entry["step"]) for entry in saved["state"].values()} == {1}
    assert first.state_dict()["remote"]["version"] == 2
    together(first.close, second.close)


# --- what is refused -----------------------------------------------------------------------------


def test_another_state_than_the_running_job_s_is_refused_and_the_job_goes_on(bench):
    saved, _ = saved_at(bench(2), 3)
    table, feed = bench(2), Feed(start())
    with split(table, feed) as optimizer:
        stepped(optimizer, feed, range(1, 3))
        with pytest.raises(JobExists, match=r"is at step 2, .* of step 3"):
            optimizer.load_state_dict(saved)
        optimizer.load_state_dict(optimizer.state_dict())
        stepped(optimizer, feed, range(3, 4))
        assert optimizer.global_step == 3


@pytest.mark.parametrize("steps", [3, 5], ids=["at the same step", "at another step"])
def test_a_worker_with_another_state_does_not_get_into_a_job(bench, steps):
    saved, _ = saved_at(bench(2), 3)
    saved["state"][0]["row_var"] += 1.0
    table, feed = bench(2), Feed(start())
    with split(table, feed) as optimizer:
        stepped(optimizer, feed, range(1, steps + 1))
        late = split(table, Feed(start()))
        late.load_state_dict(saved)
        stray = late.param_groups[0]["params"]
        for parameter in stray:
            parameter.grad = torch.zeros_like(parameter)
        with pytest.raises(JobExists, match=f"step {steps}"):
            late.step()
        stepped(optimizer, feed, range(steps + 1, steps + 2))


def test_a_job_is_begun_anew_from_an_older_state_on_request(bench):
    saved, weights = saved_at(bench(2), 3)
    table, feed = bench(2), Feed(start())
    with split(table, feed) as optimizer:
        stepped(optimizer, feed, range(1, 6))
    again = Feed(weights)
    with split(table, again, on_existing="replace") as optimizer:
        optimizer.load_state_dict(saved)
        stepped(optimizer, again, range(4, 6))
        assert optimizer.global_step == 5
    for tensor, weight in feed.weights().items():
        assert torch.equal(again.weights()[tensor], weight), tensor


def test_the_running_job_is_replaced_on_request(bench):
    saved, weights = saved_at(bench(2), 3)
    table, feed = bench(2), Feed(start())
    with split(table, feed, on_existing="replace") as optimizer:
        stepped(optimizer, feed, range(1, 6))
        five = feed.weights()
        with torch.no_grad():
            for name, parameter in feed.parameters.items():
                parameter.copy_(weights[name])
        optimizer.load_state_dict(saved)
        stepped(optimizer, feed, range(4, 6))
        assert optimizer.global_step == 5
    for tensor, weight in five.items():
        assert torch.equal(feed.weights()[tensor], weight), tensor


def test_the_dict_of_another_model_names_the_first_tensor_and_both_shapes(bench):
    saved, _ = saved_at(bench(1), 1)
    other = Feed(start() | {"wide": torch.zeros(5, 40)})
    with pytest.raises(ModelMismatch) as refused:
        split(bench(1), other).load_state_dict(saved)
    assert "parameter 3 'wide' (5, 40)" in refused.value.message
    assert "col_var (1, 48)" in refused.value.message
    assert "col_var (1, 40)" in refused.value.message
