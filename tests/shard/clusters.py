"""Several `Rounds` with a network between them, all in the test's hand: no thread, no gradient."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import torch
from tests.shard import jobs

from adashard.wire.messages import Begin, Entry, Exchange, Plan, Record, Report
from adashard.wire.placement import Slice
from adashard_server.optim.partials import Partial, alone
from adashard_server.shard.instructions import (
    Add,
    Committed,
    Instruction,
    Measure,
    Refuse,
    Send,
    Wait,
)
from adashard_server.shard.partials import Finding, short_count
from adashard_server.shard.records import bit
from adashard_server.shard.rounds import Rounds


class Node:
    """One shard's rounds; notes who was added to each element instead of adding numbers.

    Args:
        name: the shard.
        square: the squared sum that a slice is measured to have.
    """

    def __init__(self, name: str, square: Callable[[int], float] = float) -> None:
        self.rounds = Rounds(name)
        self.sums: dict[int, list[list[str]]] = {}
        self.records: list[Record] = []
        self.committed: list[Committed] = []
        self.sent: list[Send] = []
        self.measured: list[Measure] = []
        self.refused: list[Refuse] = []
        self.square = square

    def open(self, plan: Plan, *, upload: bool = True) -> None:
        """Freeze, plan, open; slices that are missing come from nowhere."""
        self.rounds.freeze(plan.entry)
        self.rounds.plan(plan)
        for index in self.rounds.mine:
            if upload and self.rounds.versions.get(index, -1) < plan.base:
                self.rounds.uploaded(index, plan.base)
        self.settle()
        self.carry_out(self.rounds.open(plan))

    def begin(self, begin: Begin) -> bool:
        """Whether the push is complete already."""
        acknowledge, instructions = self.rounds.begin(begin)
        self.carry_out(instructions)
        return acknowledge.complete

    def push(self, begin: Begin, index: int, start: int, count: int) -> bool:
        """Sends elements of a slice; whether they are done with (False: wait for others)."""
        admission = self.rounds.admit(begin, index, start, count)
        if isinstance(admission, Wait):
            return False
        if isinstance(admission, Add):
            self._add(begin.sender, index, admission)
            self.carry_out(self.rounds.added(begin, index, admission.stop))
        return True

    def push_all(self, begin: Begin) -> None:
        """A whole push at once; nothing may have to wait."""
        if self.begin(begin):
            return
        for index in self.rounds.mine:
            piece = self.rounds.slices[index]
            if bit(begin.present, piece.parameter):
                assert self.push(begin, index, 0, piece.element_count)

    def carry_out(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Measure():
                    self.measured.append(instruction)
                    self.carry_out(self.rounds.measured(instruction, self._findings(instruction)))
                case Send():
                    self.sent.append(instruction)
                case Refuse():
                    self.refused.append(instruction)
                case Committed(record=record):
                    self.records.append(record)
                    self.committed.append(instruction)

    def settle(self) -> None:
        """Every slice takes the step that it owes."""
        for index in self.rounds.owed:
            self.rounds.applied(index)

    def _findings(self, measure: Measure) -> dict[int, Finding]:
        return {
            index: found(self.rounds.slices[index], measure.exchange, self.square(index))
            for index in measure.slices
        }

    def _add(self, worker: str, index: int, add: Add) -> None:
        count = self.rounds.slices[index].element_count
        elements = self.sums.setdefault(index, [[] for _ in range(count)])
        for element in range(add.start, add.stop):
            if add.first:
                elements[element] = []
            elements[element].append(worker)


class Cluster:
    """Nodes of one job, and the reports that are on their way between them."""

    def __init__(self, entry: Entry, base: int = 0) -> None:
        self.entry = entry
        self.nodes = {shard.id: Node(shard.id) for shard in entry.shards}
        self.flying: list[tuple[str, Report, str | None]] = []
        for node in self.nodes.values():
            node.open(jobs.plan(entry, base))

    def push_all(self, step: int = 1, **options) -> None:
        for worker in self.entry.workers:
            for name, node in self.nodes.items():
                node.push_all(jobs.begin(self.entry, worker.id, step, receiver=name, **options))

    def collect_sent(self) -> None:
        """Puts what the nodes have sent on its way."""
        for node in self.nodes.values():
            for send in node.sent:
                for peer in send.peers:
                    asker = node.rounds.shard if peer in send.wanted else None
                    self.flying.append((peer, send.report, asker))
            node.sent.clear()

    def deliver(self, index: int, *, keep: bool = False) -> None:
        """One report arrives, and the answer to it is put on its way."""
        receiver, report, asker = self.flying[index] if keep else self.flying.pop(index)
        node = self.nodes[receiver]
        node.carry_out(node.rounds.exchange(report))
        own = node.rounds.own_report(report.step, report.exchange) if asker else None
        if own and asker:
            self.flying.append((asker, own, None))
        self.collect_sent()

    def deliver_all(self) -> None:
        self.collect_sent()
        while self.flying:
            self.deliver(0)

    @property
    def records(self) -> list[list[Record]]:
        return [node.records for node in self.nodes.values()]


def found(piece: Slice, exchange: Exchange, square: float) -> Finding:
    """What a slice might find out: numbers of its own, whose sums depend on their order."""
    if exchange is Exchange.NORM or not piece.split:
        return Finding(square)
    if exchange is Exchange.CLAMPED:
        return Finding(0.0, alone(0.0, 0.7 * piece.index))
    numbers = torch.Generator().manual_seed(piece.index)
    squares, ratios = torch.rand(2, short_count(piece), generator=numbers)
    partial = Partial(
        weight_squared_sum=0.1 * piece.index,
        update_squared_sum=0.3 * piece.index,
        least=1.0 + piece.index,
        squares=squares,
        ratios=ratios,
    )
    return Finding(square, partial)


def pieces(piece: Slice, chooser: random.Random) -> list[tuple[int, int, int]]:
    """A slice cut anywhere: (slice, start, count)."""
    borders = sorted({0, piece.element_count, *(chooser.choices(range(piece.element_count), k=2))})
    return [(piece.index, start, stop - start) for start, stop in itertools.pairwise(borders)]
