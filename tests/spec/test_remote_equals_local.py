"""A run through the service equals the local optimizer of the same name, to rounding."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.spec.conftest import together, tolerance

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


def as_in_trainer(params):
    """`optim="adafactor"` of transformers' Trainer, which bounds the norm of the gradient first."""
    params = list(params)
    made = transformers.Adafactor(params, lr=5e-5, scale_parameter=False, relative_step=False)

    def bound(*_) -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)

    made.register_step_pre_hook(bound)
    return made


LOCAL = {
    "paper": lambda params: transformers.Adafactor(params),
    "torch": lambda params: torch.optim.Adafactor(
        params, lr=1e-2, eps=(torch.finfo(torch.float32).eps, 1e-3)
    ),
    "transformers-trainer": as_in_trainer,
}
OPTIONS = {"transformers-trainer": {"max_grad_norm": 1.0}}
SLICE_BYTES = 2048  # cuts the matrices, the larger of them into 16


@pytest.mark.parametrize("semantics", LOCAL)
def test_fifty_steps_equal_those_of_the_library_in_float64(bench, semantics):
    network, start = model(), model()
    options = {"semantics": semantics, "slice_bytes": SLICE_BYTES, **OPTIONS.get(semantics, {})}
    with bench(2).adafactor(network.named_parameters(), **options) as optimizer:
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
