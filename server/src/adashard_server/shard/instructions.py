"""What the rounds ask of the engine that carries them out."""

from __future__ import annotations

from dataclasses import dataclass

from adashard.wire.messages import Exchange, Record, Report
from adashard_server.shard.records import Poison


@dataclass(frozen=True, slots=True)
class Add:
    """Add elements `start` to `stop` of a slice; `first` overwrites what the sum holds.

    What comes before the run that asked is zero: a gradient of sparse rows leaves it out.
    """

    start: int
    stop: int
    first: bool


@dataclass(frozen=True, slots=True)
class Wait:
    """A worker of lower rank has not come this far in the slice: the order of a sum is fixed."""


@dataclass(frozen=True, slots=True)
class Measure:
    """The sums of these slices are full: find out what the exchange needs of them.

    `draft` is the record as it stands before the exchange.
    """

    slices: tuple[int, ...]
    exchange: Exchange
    draft: Record


@dataclass(frozen=True, slots=True)
class Send:
    """Hand `report` to `peers`; `wanted` are those whose own report is missing here."""

    report: Report
    peers: tuple[str, ...]
    wanted: frozenset[str]


@dataclass(frozen=True, slots=True)
class Refuse:
    """A report contradicts what is known of the step: it counts as not received."""

    sender: str
    why: str


@dataclass(frozen=True, slots=True)
class Committed:
    """The step is decided: its record is kept, and its slices owe it.

    Attributes:
        record: of the step.
        squared_sum: of the mean gradient on this shard alone.
        poison: what of it was not finite, as far as this shard knows.
    """

    record: Record
    squared_sum: float
    poison: Poison


@dataclass(frozen=True, slots=True)
class Degraded:
    """A decided step is finished in some slices without workers that died in it with a shard."""

    step: int
    slices: tuple[int, ...]
    gone: tuple[str, ...]


Admission = Add | Wait | None
Instruction = Measure | Send | Refuse | Committed | Degraded
