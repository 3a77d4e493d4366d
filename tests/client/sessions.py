"""A session without anybody around it, and parameters for an optimizer that has one."""

from __future__ import annotations

import torch
from torch.nn import Parameter


class FakeSession:
    """Takes steps without anybody; remembers what it was given."""

    made: list[FakeSession]
    error: BaseException | None = None

    def __init__(
        self,
        transport,
        address,
        job,
        spec,
        parameters,
        *,
        on_existing,
        token,
        replies=None,
        loaded=None,
    ):
        self.id, self.rank, self.version = "worker-1", 4, -1
        self.address, self.job, self.spec = address, job, spec
        self.parameters, self.on_existing, self.token = parameters, on_existing, token
        self.replies, self.loaded = replies, loaded
        self.pushes, self.groups, self.logged, self.not_finite = [], [], [], []
        self.used, self.applied = True, True
        self.closed, self.abandoned = 0, 0
        type(self).made.append(self)

    def step(self, push):
        if self.error is not None:
            raise self.error
        self.pushes.append(dict(push.gradients))
        self.not_finite.append(push.not_finite)
        self.groups.append(push.settings((0,) * len(self.spec.parameters)))
        self.version += 2 if self.version < 0 else 1
        return self.used

    def log(self, values):
        self.logged.append(dict(values))

    def close(self):
        self.closed += 1

    def abandon(self):
        self.abandoned += 1


def parameters(count: int = 2) -> list[Parameter]:
    made = [Parameter(torch.ones(2, 2 + index)) for index in range(count)]
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    return made
