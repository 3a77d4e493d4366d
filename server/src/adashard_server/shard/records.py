"""What a step was: its record, formed from pushes and reports, the same on whichever shard.

A *draft* is the record as it would be if every gradient turned out finite. It is there as soon as
all workers have begun their pushes, and tells slices all that they need to measure themselves.
Each exchange completes it; after the last one it is the record.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import add

from adashard.wire.messages import Begin, Exchange, Outcome, Record, Report
from adashard.wire.placement import Node, Slice, merged
from adashard.wire.spec import Parameter
from adashard_server.shard.partials import added, summed, unpacked

NAMED_MAX = 8
"""Parameters that are named where gradients are not finite."""

_NORM_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


def draft_record(step: int, begins: Sequence[Begin], step_counts: Sequence[int]) -> Record:
    """What a step will have been if nothing is wrong with it; a skip where a worker says so.

    Hyper-parameters and scalars are those of the lowest rank: computed once, since `pow` is not
    the same everywhere.

    Args:
        step: its number.
        begins: of the workers that are summed, in rank order.
        step_counts: each parameter's count of updates before the step.
    """
    present = present_in_any(begins)
    draft = Record(
        step=step,
        workers=tuple(begin.sender for begin in begins),
        shares=tuple(begin.share for begin in begins),
        outcome=Outcome.APPLY,
        present=present,
        step_counts=tuple(
            count + 1 if bit(present, parameter) else count
            for parameter, count in enumerate(step_counts)
        ),
        groups=begins[0].groups,
    )
    return skipped(draft, step_counts) if any(begin.not_finite for begin in begins) else draft


def completed(
    draft: Record,
    exchange: Exchange,
    reports: Collection[tuple[Report, Sequence[Node]]],
    slices: Sequence[Slice],
    max_grad_norm: float,
) -> Record:
    """The draft with what an exchange adds to it (S7); all gradients are finite.

    Args:
        draft: as the exchange before has left it.
        exchange: whose reports are all here.
        reports: of all shards, each with the nodes that its squared sums are of.
        slices: of the job.
        max_grad_norm: bound of the gradient's norm; 0 for none.
    """
    if exchange is Exchange.CLAMPED:
        return _with_clamped(draft, [report for report, _ in reports], slices)
    if exchange is Exchange.PARTIALS:
        told = (partial for report, _ in reports for partial in report.partials)
        ordered = sorted(told, key=lambda partial: partial.slice)
        parts = ((one.slice, one.count, unpacked(one)) for one in ordered)
        draft = replace(draft, partials=summed(slices, parts))
        if max_grad_norm:
            return draft  # the norm before it was bounded is known already
    squared_norm = _squared_norm(reports, slices)
    factor = 1.0
    if max_grad_norm:
        factor = min(1.0, max_grad_norm / (math.sqrt(squared_norm) + _NORM_EPS))
    return replace(draft, squared_norm=squared_norm, norm_factor=factor)


def skipped(draft: Record, step_counts: Sequence[int]) -> Record:
    """The record of a step that no shard applies, as a gradient was not finite."""
    return replace(
        draft,
        outcome=Outcome.SKIP,
        step_counts=tuple(step_counts),
        squared_norm=0.0,
        norm_factor=1.0,
        partials=(),
    )


def without(record: Record, gone: Collection[str]) -> Record:
    """The record of a step, as those take it who finish it without the workers that are gone."""
    left = [
        (worker, share)
        for worker, share in zip(record.workers, record.shares, strict=True)
        if worker not in gone
    ]
    return replace(
        record,
        workers=tuple(worker for worker, _ in left),
        shares=tuple(share for _, share in left),
    )


def counts_before(record: Record) -> tuple[int, ...]:
    """Each parameter's count of updates before the record's step."""
    if record.outcome is not Outcome.APPLY:
        return record.step_counts
    return tuple(
        count - bit(record.present, parameter) for parameter, count in enumerate(record.step_counts)
    )


@dataclass(frozen=True, slots=True)
class Poison:
    """What of a step was not finite, as far as one shard knows; for people.

    Attributes:
        workers: those that said so.
        parameters: some of the names.
    """

    workers: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


CLEAN = Poison()
"""Of a step without any."""


def poison(
    begins: Iterable[Begin], found: Collection[int], parameters: Sequence[Parameter]
) -> Poison:
    """What workers say of a step's gradients, and what a shard has found in the sums.

    Args:
        begins: of the workers that are summed.
        found: parameters of slices whose sums are not finite here.
        parameters: of the job.
    """
    said = {begin.sender: begin.not_finite for begin in begins if begin.not_finite}
    indices = sorted(set(found).union(*said.values()))
    return Poison(tuple(said), tuple(parameters[index].name for index in indices[:NAMED_MAX]))


def _squared_norm(
    reports: Iterable[tuple[Report, Sequence[Node]]], slices: Sequence[Slice]
) -> float:
    """Squared norm of the mean gradient: along the slices' trees, then in registration order."""
    parts = (
        (node.slice, node.count, square)
        for report, nodes in reports
        for node, square in zip(nodes, report.squared_sums, strict=True)
    )
    return added(square for _, _, square in merged(slices, sorted(parts), add))


def _with_clamped(draft: Record, reports: Iterable[Report], slices: Sequence[Slice]) -> Record:
    """Puts in the squared sums of updates that were taken element by element."""
    parts = (
        (partial.slice, partial.count, partial.update_squared_sum)
        for report in reports
        for partial in report.partials
    )
    found = {first: total for first, _, total in merged(slices, sorted(parts), add)}
    return replace(
        draft,
        partials=tuple(
            replace(partial, update_squared_sum=found[partial.slice])
            if partial.slice in found
            else partial
            for partial in draft.partials
        ),
    )


def present_in_any(begins: Iterable[Begin]) -> bytes:
    """One bit per parameter: whether any of the workers has a gradient for it."""
    bits, size = 0, 0
    for begin in begins:
        bits |= int.from_bytes(begin.present, "little")
        size = len(begin.present)
    return bits.to_bytes(size, "little")


def bit(bits: bytes, index: int) -> bool:
    """Whether bit `index`, least significant first, is set; no bits at all are not."""
    return bool(bits and bits[index >> 3] >> (index & 7) & 1)
