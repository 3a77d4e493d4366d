"""Update and exchange of a job on any number of shards, all in the calling thread.

What the shards of a job do between full sums and new weights, and nothing else: stores of slices
and exchanges as they are in a shard, reports as the bytes that travel. No network, no lock, no
other thread, so that the processor's time in it is that of this work alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from adashard import schedule
from adashard.wire import codec
from adashard.wire.messages import (
    AdafactorStep,
    Begin,
    Content,
    Entry,
    ExchangeRequest,
    GroupStep,
    Member,
    Schedule,
)
from adashard.wire.placement import cut
from adashard.wire.spec import AdafactorLayout, Group, JobSpec, Parameter
from adashard.wire.v1 import peer_pb2
from adashard_server.cluster.planner import place
from adashard_server.shard.exchanges import Exchanges, Holdings, holdings
from adashard_server.shard.instructions import Instruction, Measure, Send
from adashard_server.shard.slices import SliceStore

WORKER = "worker"


def present(count: int) -> bytes:
    """The bits of a push that has a gradient for each of so many parameters."""
    return ((1 << count) - 1).to_bytes((count + 7) // 8, "little")


class OneThread:
    """A job of some parameters, with gradients that stay.

    Its slices are in one place whichever shards are said to hold them: how fast memory is differs
    from one allocation to the next by more than what is to be measured.

    Args:
        shapes: of the parameters.
        slice_bytes: what they are cut into.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], slice_bytes: int) -> None:
        self._spec = JobSpec(
            parameters=tuple(
                Parameter(name=f"weight-{number}", shape=shape)
                for number, shape in enumerate(shapes)
            ),
            groups=(Group(adafactor=AdafactorLayout()),),
            slice_bytes=slice_bytes,
            min_workers=1,
        )
        self._slices = cut(self._spec)
        self._store = SliceStore(self._spec, self._slices, torch.device("cpu"))
        self._holdings: dict[int, Holdings] = {}
        self._exchanges: dict[str, Exchanges] = {}
        self._step = 0
        generator = torch.Generator().manual_seed(0)
        for piece in self._slices:
            weight, gradient = (
                torch.randn(piece.element_count, generator=generator) for _ in range(2)
            )
            self._store.put(piece.index, {Content.WEIGHT: weight})
            self._store.add(piece.index, 0, 0, gradient, share=1.0, first=True)

    @property
    def slice_count(self) -> int:
        """How many slices there are."""
        return len(self._slices)

    def step_s(self, shard_count: int) -> float:
        """Processor seconds of a step on so many shards, from full sums to new weights."""
        held = self._holdings.setdefault(shard_count, self._held(shard_count))
        began = time.thread_time()
        self._step += 1
        begin, counts = self._begin(), (self._step - 1,) * len(self._spec.parameters)
        self._exchanges = {
            name: Exchanges(name, self._step, (WORKER,), held) for name in held.by_shard
        }
        for name, exchanges in self._exchanges.items():
            exchanges.begin([begin], counts)
            for index in held.by_shard[name]:  # as they become full
                self._carry_out(name, exchanges.full([index]))
        for name, exchanges in self._exchanges.items():
            assert exchanges.record is not None
            for index in held.by_shard[name]:
                self._store.apply(index, exchanges.record)
        return time.thread_time() - began

    def _held(self, shard_count: int) -> Holdings:
        """Who holds what, in a generation that has taken steps before."""
        names = [f"shard-{number}" for number in range(shard_count)]
        entry = Entry(
            job="job",
            generation=1,
            author="",
            spec=self._spec,
            workers=(Member(id=WORKER),),
            shards=tuple(Member(id=name) for name in names),
            placement=place(self._slices, names),
        )
        held = holdings(entry, self._slices)
        assert held.nodes  # is worked out when it is first asked for
        assert not held.clamps
        return held

    def _begin(self) -> Begin:
        scalars = Schedule(
            step_count=self._step,
            beta2=schedule.beta2(self._step, -0.8),
            rho=schedule.rho(self._step, lr=None, relative_step=True, warmup_init=False),
        )
        settings = AdafactorStep(eps1=1e-30, eps2=1e-3, clip_threshold=1.0)
        return Begin(
            job="job",
            generation=1,
            sender=WORKER,
            receiver="",
            step=self._step,
            push=True,
            present=present(len(self._spec.parameters)),
            groups=(GroupStep(adafactor=settings, schedules=(scalars,)),),
        )

    def _carry_out(self, name: str, instructions: Sequence[Instruction]) -> None:
        exchanges = self._exchanges[name]
        for instruction in instructions:
            match instruction:
                case Measure(slices=slices, exchange=exchange, draft=draft):
                    for index in slices:
                        finding = self._store.measure(index, exchange, draft)
                        self._carry_out(name, exchanges.measured(instruction, {index: finding}))
                case Send(report=report, peers=peers):
                    encoded = codec.to_proto(report)
                    for peer in peers:
                        self._deliver(peer, encoded)

    def _deliver(self, receiver: str, report: peer_pb2.Report) -> None:
        """Hands a report on as the bytes that it is between shards."""
        sent = peer_pb2.ExchangeRequest(receiver=receiver, report=report)
        came = codec.from_proto(peer_pb2.ExchangeRequest.FromString(sent.SerializeToString()))
        assert isinstance(came, ExchangeRequest)
        self._exchanges[receiver].check(came.report)
        self._carry_out(receiver, self._exchanges[receiver].take(came.report))
