"""Any job, any gradients, any settings: what properties of whole shards are tried on."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.trainings import Push, Tensors, Training
from torch import Tensor

from adashard.wire.placement import cut
from adashard.wire.spec import (
    AdafactorLayout,
    EpsPlacement,
    FactoredAxes,
    Group,
    JobSpec,
    Parameter,
    WeightDecayMode,
)

STEPS = 3

shapes = (
    st.just(())
    | st.tuples(st.integers(1, 50))
    | st.tuples(st.integers(1, 14), st.integers(1, 40))
    | st.tuples(st.integers(1, 40), st.integers(1, 6))
    | st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8))
    | st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
)
layouts = st.builds(
    AdafactorLayout,
    factored_axes=st.sampled_from([FactoredAxes.LAST_TWO, FactoredAxes.LARGEST_TWO]),
    min_dim_size_to_factor=st.sampled_from([1, 1, 3]),
    momentum=st.booleans(),
    eps_placement=st.sampled_from([EpsPlacement.ADDED, EpsPlacement.CLAMPED]),
)


@st.composite
def specs(draw) -> JobSpec:
    groups = draw(st.lists(st.builds(Group, adafactor=layouts), min_size=1, max_size=2))
    parameters = [
        Parameter(name=f"p{index}", shape=shape, group=draw(st.integers(0, len(groups) - 1)))
        for index, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=3)))
    ]
    return JobSpec(
        parameters=tuple(parameters),
        groups=tuple(groups),
        slice_bytes=draw(st.sampled_from([64, 64, 100, 256, 1 << 20])),
        min_workers=1,
    )


@dataclass(frozen=True)
class Case:
    """A job, what its workers push in each step, and how it is spread over shards."""

    job: JobSpec
    placement: list[int]
    steps: list[list[Push]] = field(repr=False)
    weights: Tensors = field(repr=False)
    chooser: random.Random = field(repr=False)

    def alone(self) -> Training:
        """On one shard."""
        return self._training([0] * len(self.placement))

    def spread(self) -> Training:
        """On all of its shards."""
        return self._training(self.placement)

    def _training(self, placement: list[int]) -> Training:
        workers = len(self.steps[0])
        return Training(self.job, self.weights, placement=placement, workers=workers)

    def dense(self) -> Case:
        """The same gradients, none of them in rows."""
        steps = [[replace(push, rows={}) for push in step] for step in self.steps]
        return replace(self, steps=steps)


@st.composite
def cases(draw, *, sparse: bool = False, least_scale: float = 1e-12) -> Case:
    """Any case whose gradients are of this size or up to 1e4."""
    job = draw(specs())
    chooser = random.Random(draw(st.integers(0, 2**32 - 1)))
    numbers = torch.Generator().manual_seed(chooser.randrange(2**32))
    scale = draw(st.sampled_from([1.0, 1e-3, least_scale, 1e4]))
    settings = draw(all_settings(job))
    shares = draw(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=4))
    options = {
        "groups": settings,
        "max_grad_norm": draw(st.sampled_from([0.0, 0.0, 0.3 * scale, 1e9])),
    }
    steps = [
        [push(job, chooser, numbers, scale, share, options, sparse=sparse) for share in shares]
        for _ in range(STEPS)
    ]
    shards = draw(st.integers(1, 8))
    placement = [chooser.randrange(shards) for _ in cut(job)]
    if draw(st.booleans()):
        placement.sort()  # in runs, as the planner has them
    return Case(job, placement, steps, model(job, numbers), chooser)


@st.composite
def all_settings(draw, job: JobSpec):
    """Hyper-parameters of each group for all steps that a case has."""
    return tuple(
        jobs.group_step(
            range(1, STEPS + 2),
            eps1=draw(st.sampled_from([1e-30, 1e-3, 2.0])),
            clip_threshold=draw(st.sampled_from([1.0, 0.1, float("inf")])),
            beta1=0.9 if group.adafactor.momentum else 0.0,
            weight_decay=draw(st.sampled_from([0.0, 0.1])),
            weight_decay_mode=draw(st.sampled_from(list(WeightDecayMode)[1:])),
            scale_parameter=draw(st.booleans()),
            lr=0.01,
        )
        for group in job.groups
    )


def model(job: JobSpec, numbers: torch.Generator) -> Tensors:
    return {
        index: torch.randn(parameter.shape, generator=numbers)
        for index, parameter in enumerate(job.parameters)
    }


def push(
    job: JobSpec,
    chooser: random.Random,
    numbers: torch.Generator,
    scale: float,
    share: float,
    options: Mapping[str, object],
    *,
    sparse: bool,
) -> Push:
    """A gradient that lacks some parameters, others of which may be sent in rows."""
    gradients: Tensors = {}
    rows: dict[int, frozenset[int]] = {}
    for index, parameter in enumerate(job.parameters):
        if chooser.random() < 0.2:
            continue
        gradients[index] = scale * torch.randn(parameter.shape, generator=numbers)
        if sparse and parameter.shape and chooser.random() < 0.7:
            length = parameter.shape[0]
            rows[index] = frozenset(r for r in range(length) if chooser.random() < 0.4)
            gradients[index] = untouched(gradients[index], rows[index])
    return Push(gradients, share, rows, options)


def untouched(gradient: Tensor, rows: frozenset[int]) -> Tensor:
    """The gradient with zeros in all rows but these."""
    kept = torch.zeros_like(gradient)
    kept[sorted(rows)] = gradient[sorted(rows)]
    return kept
