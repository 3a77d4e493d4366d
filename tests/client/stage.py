"""A session with scripted servers around it."""

from __future__ import annotations

import torch
from tests.client.fakes import FakeShard, FakeTransport
from tests.shard import jobs

from adashard.push import Push
from adashard.session import Session
from adashard.wire.control import Freeze, Frozen, OnExisting, Open, Opened
from adashard.wire.messages import Entry, Member

SPEC = jobs.spec((4,), (3,))


class Stage:
    """One session, its shards, and the coordinator's lines."""

    def __init__(self, shards: int = 1, weights: float = 0.0, **options) -> None:
        self.members = [Member(id=f"s{n}", address=f"s{n}:1") for n in range(shards)]
        self.shards = [
            FakeShard({i: torch.full((4 - i,), weights) for i in range(2) if i % shards == n})
            for n in range(shards)
        ]
        addresses = [member.address for member in self.members]
        self.transport = FakeTransport(dict(zip(addresses, self.shards, strict=True)))
        self.parameters = [torch.zeros(4), torch.zeros(3)]
        self.counts: list[tuple[int, ...]] = []
        self.session = Session(
            self.transport,
            "coordinator:1",
            jobs.JOB,
            SPEC,
            self.parameters,
            on_existing=OnExisting.RESUME,
            token="secret",
            **options,
        )
        self.control = self.transport.control()

    def entry(self, generation: int = 1, *, origin: str | None = None, **options):
        return jobs.entry(
            SPEC,
            generation=generation,
            workers=[self.session.id],
            shards=self.members,
            origin=origin or self.session.id,
            **options,
        )

    def freeze(self, generation: int = 1, **options) -> Frozen:
        return self.freeze_with(self.entry(generation, **options))

    def freeze_with(self, entry: Entry) -> Frozen:
        self.control.say(Freeze(entry=entry))
        return self.transport.hear(Frozen)

    def open(self, generation: int = 1, base: int = 0, of=None, **options) -> None:
        """All of a change of generation but its uploads."""
        self.freeze(generation, **options)
        self.control.say(Open(plan=jobs.plan(self.entry(generation, **options), base, of)))
        self.transport.hear(Opened)

    def push(self, value: float = 1.0) -> Push:
        def settings(counts):
            self.counts.append(counts)
            return (jobs.group_step(),)

        gradients = {0: torch.full((4,), value), 1: torch.full((3,), value)}
        return Push(gradients=gradients, settings=settings)

    def step(self, value: float = 1.0) -> bool:
        return self.session.step(self.push(value))

    @property
    def values(self) -> list[float]:
        """The value of all elements of each parameter; they never differ."""
        for parameter in self.parameters:
            assert parameter.unique().numel() == 1, "torn"
        return [float(parameter[0]) for parameter in self.parameters]
