"""What a step was: its record, formed from pushes and reports, the same on whichever shard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from adashard.wire.messages import Begin, Outcome, Record, Report


def form_record(
    step: int, begins: Sequence[Begin], reports: Iterable[Report], step_counts: Sequence[int]
) -> Record:
    """The record of a step (S7).

    It is skipped, on all shards alike, if a sum on any of them is not finite. Hyper-parameters and
    scalars are those of the lowest rank: computed once, since `pow` is not the same everywhere.

    Args:
        step: its number.
        begins: of the workers that were summed, in rank order.
        reports: of all shards.
        step_counts: each parameter's count of updates before the step.
    """
    told = list(reports)
    finite = all(report.finite for report in told)
    present = present_in_any(begins)
    squares = {
        index: square
        for report in told
        for index, square in zip(report.slices, report.squared_sums, strict=True)
    }
    return Record(
        step=step,
        workers=tuple(begin.sender for begin in begins),
        shares=tuple(begin.share for begin in begins),
        outcome=Outcome.APPLY if finite else Outcome.SKIP,
        present=present,
        step_counts=tuple(
            count + 1 if finite and bit(present, parameter) else count
            for parameter, count in enumerate(step_counts)
        ),
        groups=begins[0].groups,
        squared_norm=sum(squares[index] for index in sorted(squares)) if finite else 0.0,
    )


def present_in_any(begins: Iterable[Begin]) -> bytes:
    """One bit per parameter: whether any of the workers has a gradient for it."""
    merged, size = 0, 0
    for begin in begins:
        merged |= int.from_bytes(begin.present, "little")
        size = len(begin.present)
    return merged.to_bytes(size, "little")


def bit(bits: bytes, index: int) -> bool:
    """Whether bit `index`, least significant first, is set."""
    return bool(bits[index >> 3] >> (index & 7) & 1)
