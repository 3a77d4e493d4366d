"""A run through the service equals the local optimizer of the same name, to rounding."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.golden.trajectories import CONFIGS, TENSORS
from tests.spec.conftest import Feed, together, tolerance

STEPS = 50


def model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Embedding(24, 16),
        # without bias: the norm behind it would leave it nothing but the noise of rounding
        torch.nn.Conv1d(6, 8, 3, padding=1, bias=False),
        torch.nn.LayerNorm(16),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 40),
        torch.nn.Tanh(),
        torch.nn.Linear(40, 24),
    )


def batches(steps: int):
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        inputs = torch.randint(24, (32, 6), generator=generator)
        yield inputs, inputs.sum(dim=1) % 24


def loss_of(network, batch):
    return torch.nn.functional.cross_entropy(network(batch[0]), batch[1])


def trained(optimizer, network, steps=STEPS):
    """Trains and returns the gradients of every step."""
    recorded = []
    for batch in batches(steps):
        optimizer.zero_grad()
        loss_of(network, batch).backward()
        recorded.append([p.grad.double() for p in network.parameters()])
        optimizer.step()
    return recorded


def followed(make_optimizer, gradients):
    """The float64 weights of a local optimizer that is fed the same gradients."""
    network = model().double()
    optimizer = make_optimizer(network.parameters())
    for step in gradients:
        for parameter, gradient in zip(network.parameters(), step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return network


LOCAL = {
    "paper": lambda params: transformers.Adafactor(params),
    "torch": lambda params: torch.optim.Adafactor(
        params, lr=1e-2, eps=(torch.finfo(torch.float32).eps, 1e-3)
    ),
}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("semantics", ["paper", "torch"])
def test_fifty_steps_equal_those_of_the_library_in_float64(bench, semantics, shards):
    network, start = model(), model()
    with bench(shards).adafactor(network.named_parameters(), semantics=semantics) as optimizer:
        gradients = trained(optimizer, network)
        assert optimizer.global_step == STEPS
    reference = followed(LOCAL[semantics], gradients)
    for (name, found), expected, begun in zip(
        network.named_parameters(), reference.parameters(), start.parameters(), strict=True
    ):
        expected, begun = expected.detach(), begun.detach().double()
        off = (found.detach().double() - expected).abs().max().item()
        assert off <= tolerance(expected, begun, STEPS), name
        assert (expected - begun).abs().max() > 1e-4, f"{name} did not move"


OVER_GRPC = [
    name for name, config in CONFIGS.items() if not config.is_bf16 and name != "accumulate_w3"
]


@pytest.mark.parametrize("name", OVER_GRPC)
def test_a_golden_trajectory_passes_through_the_service(bench, name):
    config = CONFIGS[name]
    feed = Feed({tensor: config.start(tensor) for tensor in TENSORS})
    found = {}
    with bench(2).adafactor(feed.named(), **config.knobs()) as optimizer:
        for step in range(1, config.last_step + 1):
            feed.give({tensor: config.gradient(tensor, step) for tensor in TENSORS})
            optimizer.step()
            for tensor, weight in feed.weights().items():
                if config.stores(tensor, "x", step):
                    found[tensor, "x", step] = weight
    assert config.differences(found) == []


CANCELLING = ("emb", "zgrad")
"""Recorded workers' gradients that add up to zero but for the rounding of their recording.

Adafactor normalises that rest, of 1e-8 of its addends, to a full step, so the recorded weights are
those of a float64 sum. Ours is float32 in rank order: for these two the local optimizer is fed the
same sum.
"""


def followed_alone(config, tensor, order):
    """The weights of a local optimizer that is fed the float32 mean in rank order, by step."""
    weight = torch.nn.Parameter(config.start(tensor))
    optimizer = transformers.Adafactor([weight])
    for step in range(1, config.last_step + 1):
        first, *others = config.worker_gradients(tensor, step).float()[order]
        weight.grad = (sum(others, start=first) / (1 + len(others))).double()
        optimizer.step()
        yield step, weight.detach().clone()


def test_the_mean_of_three_workers_follows_its_golden_trajectory(bench):
    config, table = CONFIGS["accumulate_w3"], bench(2)
    feeds = [Feed({tensor: config.start(tensor) for tensor in TENSORS}) for _ in range(3)]
    optimizers = [table.adafactor(feed.named(), min_workers=3) for feed in feeds]
    found = {}
    for step in range(1, config.last_step + 1):
        for worker, feed in enumerate(feeds):
            feed.give({t: config.worker_gradients(t, step)[worker] for t in TENSORS})
        together(*(optimizer.step for optimizer in optimizers))
        for tensor, weight in feeds[0].weights().items():
            found[tensor, "x", step] = weight
        for feed in feeds[1:]:
            assert all(torch.equal(feed.weights()[t], feeds[0].weights()[t]) for t in TENSORS)
    order = sorted(range(3), key=lambda worker: optimizers[worker].worker_rank)
    together(*(optimizer.close for optimizer in optimizers))
    exact = {key: weight for key, weight in found.items() if key[0] not in CANCELLING}
    assert config.differences(exact) == []
    for tensor in CANCELLING:
        for step, expected in followed_alone(config, tensor, order):
            off = (found[tensor, "x", step].double() - expected).abs().max().item()
            assert off <= tolerance(expected, config.start(tensor), step)


def test_a_bf16_worker_holds_the_fp32_trajectory_rounded_once(bench):
    config = CONFIGS["bf16_hf"]
    steps = range(1, config.last_step + 1)
    gradients = [{t: config.gradient(t, step).bfloat16() for t in TENSORS} for step in steps]
    start = {tensor: config.start(tensor) for tensor in TENSORS}
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        feed = Feed(start, dtype)
        with bench(2).adafactor(feed.named()) as optimizer:
            for gradient in gradients:
                feed.give(gradient)
                optimizer.step()
        results.append(feed.weights())
    narrow, masters = results
    for tensor in TENSORS:
        assert narrow[tensor].dtype is torch.bfloat16
        assert torch.equal(narrow[tensor], masters[tensor].bfloat16()), tensor


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_bits_do_not_depend_on_the_number_of_shards_or_where_they_run(bench, shards):
    config = CONFIGS["all_on"]

    def run(table):
        feed = Feed({tensor: config.start(tensor) for tensor in TENSORS})
        with table.adafactor(feed.named(), **config.knobs()) as optimizer:
            for step in range(1, 6):
                feed.give({tensor: config.gradient(tensor, step) for tensor in TENSORS})
                optimizer.step()
        return feed.weights()

    one, many = run(bench(1)), run(bench(shards))
    assert all(torch.equal(one[tensor], many[tensor]) for tensor in TENSORS)


def test_two_workers_with_halves_of_a_batch_equal_one_with_the_whole(bench):
    whole, table = model(), bench(2)
    with bench(2).adafactor(whole.named_parameters()) as optimizer:
        for batch in batches(10):
            optimizer.zero_grad()
            loss_of(whole, batch).backward()
            optimizer.step()
    halves = [model(), model()]
    optimizers = [table.adafactor(network.named_parameters(), min_workers=2) for network in halves]
    for inputs, targets in batches(10):
        for half, network in enumerate(halves):
            network.zero_grad()
            loss_of(network, (inputs[half::2], targets[half::2])).backward()
        together(*(optimizer.step for optimizer in optimizers))
    together(*(optimizer.close for optimizer in optimizers))
    for expected, found, other, begun in zip(
        whole.parameters(), *(one.parameters() for one in halves), model().parameters(), strict=True
    ):
        assert torch.equal(found, other)
        change = (expected - begun).abs().max()
        assert (found - expected).abs().max() <= 1e-4 * change
