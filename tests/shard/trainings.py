"""Jobs trained on shards by one thread, which lets frames arrive in whatever order it likes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from tests.shard import jobs
from tests.shard.tables import Reply, Table, alive, piece, read
from torch import Tensor

from adashard.wire.messages import Begin, Content, Record, Run
from adashard.wire.placement import Slice, cut
from adashard.wire.spec import DType, JobSpec
from adashard_server.shard.engine import Engine

Tensors = dict[int, Tensor]


@dataclass(frozen=True)
class Push:
    """One worker's gradient of one step, by parameter.

    Attributes:
        gradients: of the parameters that have one; dense.
        share: how much it counts.
        rows: of parameters that are sent in rows, the rows that are touched.
        options: what else its beginning says.
    """

    gradients: Mapping[int, Tensor]
    share: float = 1.0
    rows: Mapping[int, frozenset[int]] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)


class Training:
    """A job on shards that hold it as `placement` says; workers a, b, and so on."""

    def __init__(
        self, job: JobSpec, weights: Tensors, *, placement: Sequence[int], workers: int
    ) -> None:
        self.slices = cut(job)
        used = sorted(set(placement))
        self.table = Table([f"s{owner}" for owner in used])
        entry = jobs.entry(
            job,
            workers="abcd"[:workers],
            shards=list(self.table.shards),
            placement=[used.index(owner) for owner in placement],
        )
        self.table.open(jobs.plan(entry), sliced(self.slices, weights))
        self.records: list[Record] = []
        self.step_number = 0

    def step(self, pushes: Sequence[Push], chooser: random.Random | None = None) -> list[Reply]:
        """One step of all workers; what each of them has got.

        Without a chooser everything comes in order of rank and whole.
        """
        streams = self.fill(pushes, chooser)
        if chooser:
            chooser.shuffle(streams)
        for stream in streams:
            stream.read()
        self.records.append(streams[0].reply.record)
        assert all(stream.reply.record == self.records[-1] for stream in streams)
        return [merged(streams, rank) for rank in range(len(pushes))]

    def fill(self, pushes: Sequence[Push], chooser: random.Random | None = None) -> list[Stream]:
        """The pushes of a step, all sent, and nothing read."""
        self.step_number += 1
        streams = [
            Stream(self, rank, push, shard, chooser)
            for rank, push in enumerate(pushes)
            for shard in self.table.shards
        ]
        while waiting := [stream for stream in streams if not stream.done]:
            (chooser.choice(waiting) if chooser else waiting[0]).act()
        return streams


def merged(streams: Sequence[Stream], rank: int) -> Reply:
    """What one worker got of all shards, as one reply."""
    replies = [stream.reply for stream in streams if stream.rank == rank]
    return replace(
        replies[0],
        weights={i: one for reply in replies for i, one in reply.weights.items()},
        states={i: one for reply in replies for i, one in reply.states.items()},
        unchanged=[index for reply in replies for index in reply.unchanged],
    )


class Stream:
    """One worker's stream to one shard: a beginning, then runs, cut and ordered anyhow."""

    def __init__(
        self,
        training: Training,
        rank: int,
        push: Push,
        shard: str,
        chooser: random.Random | None,
    ) -> None:
        self.rank = rank
        self.reply: Reply
        self._engine: Engine = training.table.engine(shard)
        entry, step = training.table.entry, training.step_number
        options = {"state": True} | dict(push.options)
        self._begin: Begin = jobs.begin(
            entry,
            "abcd"[rank],
            step,
            receiver=shard,
            present=push.gradients,
            sparse=push.rows,
            share=push.share,
            **options,
        )
        mine = [
            one
            for one in training.slices
            if training.table.owner(one.index) == shard and one.parameter in push.gradients
        ]
        if chooser:
            chooser.shuffle(mine)
        self._todo = [run for one in mine for run in runs(one, push, chooser)]
        self._begun = False

    @property
    def done(self) -> bool:
        return self._begun and not self._todo

    def act(self) -> None:
        """Begins, or sends the next run; nothing has to wait, as there is room for all."""
        if not self._begun:
            self._begun = True
            self.acknowledge = self._engine.begin(self._begin)
        else:
            self._engine.push(self._begin, *self._todo.pop(0), alive)

    def read(self) -> None:
        record = self._engine.wait_decided(self._begin, alive)
        frames = self._engine.reply(self._begin, alive)
        self.reply = read(self.acknowledge, record, frames)


# --- a model in slices ---------------------------------------------------------------------------


def part(piece: Slice, tensor: Tensor) -> Tensor:
    """What of a parameter a slice is."""
    return (
        tensor.narrow(piece.axis, piece.start, piece.shape[piece.axis]) if piece.shape else tensor
    )


def sliced(slices: Sequence[Slice], tensors: Mapping[int, Tensor]) -> Tensors:
    """Parameters by slice, flat."""
    return {
        one.index: part(one, tensors[one.parameter]).reshape(-1)
        for one in slices
        if one.parameter in tensors
    }


def whole(job: JobSpec, flat: Mapping[int, Tensor]) -> Tensors:
    """Slices put together, by parameter."""
    found: dict[int, list[Tensor]] = {}
    for one in cut(job):
        found.setdefault(one.parameter, []).append(flat[one.index].view(one.shape))
    axes = {one.parameter: one.axis for one in cut(job)}
    return {
        parameter: torch.cat(parts, axes[parameter]) if len(parts) > 1 else parts[0]
        for parameter, parts in found.items()
    }


def runs(one: Slice, push: Push, chooser: random.Random | None) -> list[tuple[Run, memoryview]]:
    """A slice's part of a gradient as it is sent: whole, or in rows with zeros between them."""
    values = part(one, push.gradients[one.parameter]).reshape(-1)
    rows = push.rows.get(one.parameter)
    count = one.element_count
    if rows is None:
        return [piece(one.index, values, *ends) for ends in borders(0, count, chooser)]
    within = [row - (one.start if one.axis == 0 else 0) for row in sorted(rows)]
    width = count // one.shape[0]
    stretches = [
        ends
        for row in within
        if 0 <= row < one.shape[0]
        for ends in borders(row * width, (row + 1) * width, chooser)
    ]
    end = Run(slice=one.index, start=count, count=0, dtype=DType.FLOAT32)
    return [*(piece(one.index, values, *ends) for ends in stretches), (end, memoryview(b""))]


def borders(start: int, stop: int, chooser: random.Random | None) -> list[tuple[int, int]]:
    """A stretch of elements cut anywhere."""
    inner = chooser.choices(range(start, stop), k=chooser.randrange(3)) if chooser else ()
    return list(itertools.pairwise(sorted({start, stop, *inner})))


# --- what is compared ----------------------------------------------------------------------------


def same(one: Reply, other: Reply) -> bool:
    """Whether weights and state are the same, bit for bit."""
    return one.weights.keys() == other.weights.keys() and all(
        torch.equal(tensor, tensors(other, index)[content])
        for index in one.weights
        for content, tensor in tensors(one, index).items()
    )


def tensors(reply: Reply, index: int) -> dict[Content, Tensor]:
    return {Content.WEIGHT: reply.weights[index], **reply.states.get(index, {})}
