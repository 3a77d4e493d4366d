"""The exchanges of one step on one shard, decided: from full sums to the step's record. Pure.

    [norm] ──▶ partials ──▶ [clamped] ──▶ record

Settings fix the list: the first only where the gradient's norm is bounded, the last only where
torch's placement of eps1 meets a factored parameter that is split. In each, slices are measured,
this shard's findings go to the others as one report, and with all reports the draft is completed.
A step that cannot be applied is known by the first exchange; where a worker says that its gradient
is not finite, before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, nan
from operator import add

from adashard.wire.errors import InvalidRequest
from adashard.wire.messages import Begin, Entry, Exchange, Outcome, Record, Report
from adashard.wire.placement import Node, Slice, merged, nodes
from adashard.wire.spec import EpsPlacement
from adashard_server.shard.instructions import Instruction, Measure, Refuse, Send
from adashard_server.shard.partials import Finding, added, short_count, summed
from adashard_server.shard.records import (
    Poison,
    bit,
    completed,
    draft_record,
    poison,
    skipped,
)


@dataclass(frozen=True)
class Holdings:
    """Who holds what in one generation, and of what sums reports are made.

    Attributes:
        entry: the generation.
        slices: of the job.
        by_shard: slices by shard, ascending, of the shards that have any.
    """

    entry: Entry
    slices: tuple[Slice, ...]
    by_shard: Mapping[str, tuple[int, ...]]

    @cached_property
    def nodes(self) -> Mapping[str, tuple[Node, ...]]:
        """By shard, the largest subtrees of slices that it holds whole."""
        return {shard: nodes(self.slices, held) for shard, held in self.by_shard.items()}

    @cached_property
    def clamps(self) -> bool:
        """Whether a bound of V can bind in a parameter that no slice knows whole."""
        return any(self.is_clamped(piece.index) for piece in self.slices)

    def is_clamped(self, index: int) -> bool:
        """Whether RMS(U) of the slice's parameter may have to be summed element by element."""
        piece, spec = self.slices[index], self.entry.spec
        layout = spec.groups[spec.parameters[piece.parameter].group].adafactor
        clamped = layout is not None and layout.eps_placement is EpsPlacement.CLAMPED
        return clamped and short_count(piece) > 0

    def partial_nodes(self, shard: str, exchange: Exchange, present: bytes) -> list[Node]:
        """The nodes whose partials a report of `shard` has, given which parameters are present."""
        if exchange is Exchange.NORM:
            return []
        return [
            node
            for node in self.nodes[shard]
            if self.slices[node.slice].split
            and bit(present, self.slices[node.slice].parameter)
            and (exchange is Exchange.PARTIALS or self.is_clamped(node.slice))
        ]


def holdings(entry: Entry, slices: tuple[Slice, ...]) -> Holdings:
    """Who holds what by `entry`."""
    placed: dict[str, list[int]] = {}
    for index, owner in enumerate(entry.placement):
        placed.setdefault(entry.shards[owner].id, []).append(index)
    return Holdings(entry, slices, {shard: tuple(held) for shard, held in placed.items()})


@dataclass(slots=True)
class Exchanges:
    """The exchanges of one step in one generation; `Rounds` covers every call.

    Attributes:
        shard: this one.
        step: whose exchanges these are.
        order: the workers that are summed, by rank.
        held: who holds what.
        record: of the step, once it is decided.
    """

    shard: str
    step: int
    order: tuple[str, ...]
    held: Holdings
    record: Record | None = None
    _begins: tuple[Begin, ...] = ()
    _draft: Record | None = None
    _before: tuple[int, ...] = ()  # step counts, should the step be skipped
    _poisoned: set[int] = field(default_factory=set)  # parameters whose sums are not finite here
    _list: tuple[Exchange, ...] = ()
    _full: set[int] = field(default_factory=set)
    _asked: set[int] = field(default_factory=set)
    _unready: set[int] = field(default_factory=set)
    _findings: dict[int, Finding] = field(default_factory=dict)
    _own: dict[Exchange, Report] = field(default_factory=dict)
    _reports: dict[Exchange, dict[str, Report]] = field(default_factory=dict)
    _believed: set[tuple[Exchange, str]] = field(default_factory=set)  # their partials were read

    @property
    def mine(self) -> tuple[int, ...]:
        """Slices placed on this shard, ascending."""
        return self.held.by_shard.get(self.shard, ())

    @property
    def begun(self) -> bool:
        """Whether the pushes of all workers have begun."""
        return self._draft is not None

    def begin(self, begins: Sequence[Begin], step_counts: tuple[int, ...]) -> None:
        """The pushes of all workers have begun.

        A step that a worker says is to be skipped is decided with that: all shards hear the same
        of every worker, and a slice needs no sum for it.

        Args:
            begins: of the workers, in their order.
            step_counts: each parameter's count of updates before the step.
        """
        self._begins, self._before = tuple(begins), step_counts
        self._draft = draft_record(self.step, begins, step_counts)
        if self._draft.outcome is Outcome.SKIP:
            self.record = self._draft
            return
        norm = (Exchange.NORM,) if self._max_grad_norm else ()
        clamped = (Exchange.CLAMPED,) if self.held.clamps else ()
        self._list = (*norm, Exchange.PARTIALS, *clamped)
        self._unready = set(self._wanted())

    def full(self, indices: Iterable[int]) -> list[Instruction]:
        """The sums of these slices are full."""
        found = list(indices)
        self._full.update(found)
        return self._go_on(found)

    def wants(self, measure: Measure) -> bool:
        """Whether the exchange that a measure is for is still at hand."""
        return self.record is None and measure.draft is self._draft

    def measured(self, measure: Measure, findings: Mapping[int, Finding]) -> list[Instruction]:
        """What was asked for has been found; ignored where it is no longer wanted."""
        if not self.wants(measure):
            return []
        for index, finding in findings.items():
            self._findings[index] = finding
            self._unready.discard(index)
        return self._go_on(())

    def take(self, report: Report) -> list[Instruction]:
        """Another shard's report, checked, which may come before this one is as far."""
        if (report.exchange, report.sender) not in self._believed:
            self._reports.setdefault(report.exchange, {})[report.sender] = report
        return self._go_on(())

    @property
    def squared_sum(self) -> float:
        """Of the mean gradient on this shard, before its norm is bounded; NaN if never measured."""
        first = next(iter(self._own.values()), None)
        return added(first.squared_sums) if first else nan

    @property
    def poison(self) -> Poison:
        """What of the step was not finite, as far as this shard knows."""
        return poison(self._begins, self._poisoned, self.held.entry.spec.parameters)

    def own(self, exchange: Exchange) -> Report | None:
        """This shard's report of an exchange, kept as long as this step's exchanges are."""
        return self._own.get(exchange)

    def repeat(self) -> list[Instruction]:
        """What to send again while it has not led to the next exchange."""
        if self.record is not None or not self._list or self._list[0] not in self._own:
            return []
        return self._send(self._list[0])

    # --- inside ---------------------------------------------------------------------------------

    @property
    def _max_grad_norm(self) -> float:
        """The bound of the norm that the lowest rank asks for; 0 for none."""
        return self._begins[0].max_grad_norm

    def _wanted(self) -> list[int]:
        """Slices that the exchange at hand has to measure: those with a gradient."""
        assert self._draft is not None
        slices, present = self.held.slices, self._draft.present
        return [
            index
            for index in self.mine
            if bit(present, slices[index].parameter)
            and (self._list[0] is not Exchange.CLAMPED or self.held.is_clamped(index))
        ]

    def _go_on(self, candidates: Iterable[int]) -> list[Instruction]:
        """Measures those of the candidates that can be, reports, completes the draft."""
        instructions: list[Instruction] = []
        while self._draft is not None and self.record is None:
            ready = sorted(self._measurable(candidates))
            if ready:
                self._asked.update(ready)
                instructions.append(Measure(tuple(ready), self._list[0], self._draft))
            if self._unready or not self._full.issuperset(self._present()):
                break
            instructions += self._report()
            instructions += self._refuse()
            if not self._complete():
                break
            candidates = tuple(self._unready)
        return instructions

    def _measurable(self, candidates: Iterable[int]) -> Iterator[int]:
        """Candidates whose sums are full, and which have not been asked what they hold."""
        for index in candidates:
            if index in self._unready and index in self._full and index not in self._asked:
                yield index

    def _present(self) -> list[int]:
        assert self._draft is not None
        slices, present = self.held.slices, self._draft.present
        return [index for index in self.mine if bit(present, slices[index].parameter)]

    def _report(self) -> list[Instruction]:
        """Tells the others what was found, once."""
        exchange = self._list[0]
        if exchange in self._own:
            return []
        own = self._own[exchange] = self._made(exchange)
        self._reports.setdefault(exchange, {})[self.shard] = own
        return self._send(exchange)

    def _send(self, exchange: Exchange) -> list[Instruction]:
        peers = tuple(peer for peer in self.held.by_shard if peer != self.shard)
        wanted = frozenset(peer for peer in peers if peer not in self._reports[exchange])
        return [Send(self._own[exchange], peers, wanted)] if peers else []

    def _made(self, exchange: Exchange) -> Report:
        entry, slices = self.held.entry, self.held.slices
        found = self._findings
        squares = {i: found[i].squared_sum if i in found else 0.0 for i in self.mine}
        broken = [slices[i].parameter for i, square in squares.items() if not isfinite(square)]
        self._poisoned.update(broken)
        leaves = ((i, 1, square) for i, square in squares.items())
        parts = ((i, 1, found[i].partial) for i in self.mine if i in found)
        split = ((i, count, part) for i, count, part in parts if part is not None)
        return Report(
            job=entry.job,
            generation=entry.generation,
            sender=self.shard,
            step=self.step,
            workers=self.order,
            finite=not broken,
            slices=self.mine,
            squared_sums=tuple(total for _, _, total in merged(slices, leaves, add)),
            exchange=exchange,
            partials=summed(slices, split),
        )

    def _complete(self) -> bool:
        """Takes the draft one exchange further if all reports are here."""
        assert self._draft is not None
        exchange, reports = self._list[0], self._reports[self._list[0]]
        if not set(reports) >= set(self.held.by_shard):
            return False
        if not all(report.finite for report in reports.values()):
            self.record = skipped(self._draft, self._before)
            return True
        told = [(report, self.held.nodes[sender]) for sender, report in reports.items()]
        self._draft = completed(self._draft, exchange, told, self.held.slices, self._max_grad_norm)
        if len(self._list) == 1:
            self.record = self._draft
            return True
        self._list = self._list[1:]
        self._findings, self._asked = {}, set()
        self._unready = set(self._wanted())
        return True

    # --- what is believed of a report -----------------------------------------------------------

    def check(self, report: Report) -> None:
        """Refuses what contradicts the generation.

        Raises:
            InvalidRequest: the report is not one that its sender can have made.
        """
        placed = self.held.by_shard.get(report.sender) if report.sender != self.shard else None
        if placed is None or placed != report.slices:
            raise InvalidRequest(
                f"a report of {report.sender} is not about the slices that are placed there"
            )
        if report.workers != self.order:
            raise InvalidRequest(
                f"a report of {report.sender} sums {len(report.workers)} workers and not the "
                f"{len(self.order)} of generation {report.generation}"
            )
        if report.exchange is Exchange.UNSPECIFIED:
            raise InvalidRequest(f"a report of {report.sender} does not say of which exchange")
        if len(report.squared_sums) != len(self.held.nodes[report.sender]):
            raise InvalidRequest(
                f"a report of {report.sender} has {len(report.squared_sums)} squared sums for "
                f"{len(self.held.nodes[report.sender])} nodes of slices"
            )

    def _refuse(self) -> list[Instruction]:
        """Drops reports whose partials are not those of the parameters that are present here."""
        assert self._draft is not None
        exchange, refused = self._list[0], list[Instruction]()
        for sender, report in list(self._reports[exchange].items()):
            if (exchange, sender) in self._believed:
                continue
            expected = self.held.partial_nodes(sender, exchange, self._draft.present)
            if not report.finite or self._fit(report, expected):
                self._believed.add((exchange, sender))
            else:
                del self._reports[exchange][sender]
                refused.append(Refuse(sender, "its partials are not those of the step"))
        return refused

    def _fit(self, report: Report, expected: Collection[Node]) -> bool:
        """Whether a report has the partials that are expected, each of the right length."""
        if len(report.partials) != len(expected):
            return False
        return all(
            (partial.slice, partial.count) == (node.slice, node.count)
            and len(partial.squares) == len(partial.ratios) == self._bytes(report.exchange, node)
            for partial, node in zip(report.partials, expected, strict=True)
        )

    def _bytes(self, exchange: Exchange, node: Node) -> int:
        return 4 * short_count(self.held.slices[node.slice]) * (exchange is Exchange.PARTIALS)
