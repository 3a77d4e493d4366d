"""The same bits at any number of shards, however slices lie and frames arrive; and the right ones.

Shards are whole here but for the network: stores, engines, and reports in memory.
"""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.models import STEPS, Case, cases
from tests.shard.trainings import Push, Training, same, whole
from torch import Tensor

from adashard.wire.control import StepSummary
from adashard.wire.messages import AdafactorStep, Outcome
from adashard.wire.placement import cut, factored_axes
from adashard.wire.spec import AdafactorLayout, EpsPlacement
from adashard_server.optim import adafactor
from adashard_server.optim.adafactor import Settings
from adashard_server.optim.factored import Axes

# --- the same ------------------------------------------------------------------------------------


@given(cases())
def test_weights_state_and_records_are_those_of_one_shard(case):
    alone, spread = case.alone(), case.spread()
    for pushes in case.steps:
        (expected, *_) = alone.step(pushes)
        for reply in spread.step(pushes, case.chooser):
            assert same(reply, expected)
    assert spread.records == alone.records


@given(cases())
def test_what_people_see_of_a_step_adds_up_to_the_same_over_all_shards(case):
    alone, spread = case.alone(), case.spread()
    for pushes in case.steps:
        alone.step(pushes)
        spread.step(pushes, case.chooser)
    for step in range(1, STEPS + 1):
        one, many = (summed_up(training, step) for training in (alone, spread))
        assert many == pytest.approx(one, rel=1e-9)


def summed_up(training: Training, step: int) -> tuple[float, float, int]:
    """Squared sums of gradient and update, and elements that were updated, over all shards."""
    told = [one for one in training.table.told if isinstance(one, StepSummary)]
    mine = [one for one in told if one.step == step]
    return (
        sum(one.gradient_squared_sum for one in mine),
        sum(one.update_squared_sum for one in mine),
        sum(one.element_count for one in mine),
    )


@given(cases(), st.integers(0, 2), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_step_with_a_gradient_that_is_not_finite_leaves_nothing_behind(case, at, broken):
    """On any of the shards: none applies it, and the steps after are as if it had not been."""
    poisoned = [poison(push, broken, case) for push in case.steps[at]]
    case.steps.insert(at, poisoned)
    undisturbed, spread = case.alone(), case.spread()
    for number, pushes in enumerate(case.steps):
        replies = spread.step(pushes, case.chooser)
        if number == at and any(push.gradients for push in pushes):
            assert spread.records[-1].outcome is Outcome.SKIP
            continue
        (expected, *_) = undisturbed.step(pushes)
        assert all(same(reply, expected) for reply in replies)
    taken = [record for record in spread.records if record.outcome is Outcome.APPLY]
    assert [dataclasses.replace(record, step=0) for record in taken] == [
        dataclasses.replace(record, step=0) for record in undisturbed.records
    ]


def poison(push: Push, value: float, case: Case) -> Push:
    """The push with one element that is not finite."""
    if not push.gradients:
        return push
    gradients = dict(push.gradients)
    index = case.chooser.choice(sorted(gradients))
    flat = gradients[index].clone().view(-1)
    flat[case.chooser.randrange(flat.numel())] = value
    return dataclasses.replace(push, gradients={**gradients, index: flat.view_as(gradients[index])})


@given(cases(sparse=True))
def test_gradients_in_rows_give_the_bits_of_dense_ones(case):
    """Of any workers, first or later in rank, also where no row or the last one is touched."""
    dense, spread = case.dense().alone(), case.spread()
    for pushes, densely in zip(case.steps, case.dense().steps, strict=True):
        (expected, *_) = dense.step(densely)
        for reply in spread.step(pushes, case.chooser):
            assert same(reply, expected)
    assert spread.records == dense.records


# --- the right ones ------------------------------------------------------------------------------


@given(cases(least_scale=1e-6))
def test_steps_are_those_of_the_readable_reference(case):
    """In float64, with the whole model in one place and the norm bounded before each step."""
    spread, reference = case.spread(), Reference(case)
    for pushes in case.steps:
        (reply, *_) = spread.step(pushes, case.chooser)
        norm = reference.step(pushes)
        assert math.isclose(spread.records[-1].squared_norm, norm**2, rel_tol=1e-4)
        _, updates, _ = summed_up(spread, spread.step_number)
        assert updates == pytest.approx(reference.update_squared_sum, rel=1e-2, abs=1e-9)
        for index, weight in whole(case.job, reply.weights).items():
            torch.testing.assert_close(
                weight.double(), reference.weights[index], rtol=1e-3, atol=2e-5
            )


@pytest.mark.parametrize("shards", [1, 3])
def test_a_bound_that_binds_for_some_elements_counts_in_the_clipping_of_all(shards):
    """The sum of squared updates is then no product of factors; clipping shows it in each step."""
    numbers = torch.Generator().manual_seed(5)
    sizes = torch.logspace(-6, 0, 40)
    gradients = [sizes * torch.randn(6, 40, generator=numbers) for _ in range(STEPS)]
    job = jobs.spec((6, 40), slice_bytes=64, eps_placement=EpsPlacement.CLAMPED)
    options = {"groups": (jobs.group_step(eps1=1e-3, clip_threshold=0.01),), "max_grad_norm": 0.0}
    case = Case(
        job=job,
        placement=[index % shards for index in range(len(cut(job)))],
        steps=[[Push({0: gradient}, options=options)] for gradient in gradients],
        weights={0: torch.ones(6, 40)},
        chooser=random.Random(5),
    )
    spread, reference = case.spread(), Reference(case)
    for pushes in case.steps:
        (reply,) = spread.step(pushes, case.chooser)
        reference.step(pushes)
        moved = whole(job, reply.weights)[0].double() - 1.0
        torch.testing.assert_close(moved, reference.weights[0] - 1.0, rtol=1e-3, atol=2e-7)
        assert float(moved.abs().max()) > 1e-4


class Reference:
    """The whole model in one place, stepped by `adafactor.step` in float64."""

    def __init__(self, case: Case) -> None:
        self.job = case.job
        self.weights = {index: one.double() for index, one in case.weights.items()}
        self.counts = dict.fromkeys(self.weights, 0)
        self.update_squared_sum = 0.0  # of the newest step, over all parameters
        self.axes = {index: self._axes(index) for index in self.weights}
        self.states = {
            index: adafactor.new_state(
                weight.shape,
                self.axes[index],
                momentum=self._layout(index).momentum,
                dtype=torch.float64,
            )
            for index, weight in self.weights.items()
        }

    def step(self, pushes: list[Push]) -> float:
        """Takes a step; the norm of the mean gradient before it is bounded."""
        total = sum(push.share for push in pushes)
        mean = {
            index: sum(push.share * push.gradients[index].double() for push in having) / total
            for index in self.weights
            if (having := [push for push in pushes if index in push.gradients])
        }
        norm = math.sqrt(sum(float(one.square().sum()) for one in mean.values()))
        bound = pushes[0].options["max_grad_norm"]
        factor = min(1.0, bound / (norm + 1e-6)) if bound else 1.0
        self.update_squared_sum = sum(
            self._step(index, factor * gradient, pushes[0]) for index, gradient in mean.items()
        )
        return norm

    def _step(self, index: int, gradient: Tensor, push: Push) -> float:
        group = push.options["groups"][self.job.parameters[index].group]
        self.counts[index] += 1
        (now,) = (one for one in group.schedules if one.step_count == self.counts[index])
        measures = adafactor.step(
            self.weights[index],
            gradient,
            self.states[index],
            self.axes[index],
            settings_of(group.adafactor, self._layout(index)),
            beta2=now.beta2,
            rho=now.rho,
        )
        return measures.update_squared_sum

    def _layout(self, index: int):
        return self.job.groups[self.job.parameters[index].group].adafactor

    def _axes(self, index: int) -> Axes | None:
        found = factored_axes(self.job.parameters[index].shape, self._layout(index))
        return Axes(*found) if found else None


def settings_of(step: AdafactorStep, layout: AdafactorLayout) -> Settings:
    """What a push says, in the words of the reference."""
    return Settings(
        eps1=step.eps1,
        eps2=step.eps2,
        clip_threshold=step.clip_threshold,
        beta1=step.beta1 if layout.momentum else None,
        weight_decay=step.weight_decay,
        weight_decay_mode=step.weight_decay_mode.name.lower(),
        scale_parameter=step.scale_parameter,
        lr=step.lr,
        clamp_eps=layout.eps_placement is EpsPlacement.CLAMPED,
    )
