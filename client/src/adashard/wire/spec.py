"""What a job is: its tensors, the groups that they are in, and the words for both.

Frozen dataclasses like those of `messages.py`, each mirroring the message of its name in
`protos/`, where meaning and units of the fields are documented.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class DType(enum.IntEnum):
    """Format of tensor elements on the wire, little endian."""

    UNSPECIFIED = 0
    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    FLOAT64 = 4
    INT8 = 5


class Rounding(enum.IntEnum):
    """How master weights become narrower ones."""

    UNSPECIFIED = 0
    NEAREST = 1
    STOCHASTIC = 2


class FactoredAxes(enum.IntEnum):
    """Which two axes of a tensor the second moment is factored over."""

    UNSPECIFIED = 0
    LAST_TWO = 1
    LARGEST_TWO = 2


class EpsPlacement(enum.IntEnum):
    """Where eps1 enters: added to the squared gradient, or as a lower bound."""

    UNSPECIFIED = 0
    ADDED = 1
    CLAMPED = 2


class WeightDecayMode(enum.IntEnum):
    """What weight decay is multiplied with: alpha, lr, or one."""

    UNSPECIFIED = 0
    ALPHA = 1
    LR = 2
    PLAIN = 3


class Recovery(enum.IntEnum):
    """Where the state of a dead shard comes from: the workers' memory, or a checkpoint."""

    UNSPECIFIED = 0
    WORKERS = 1
    CHECKPOINT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AdafactorLayout:
    """What makes up Adafactor's state of a group; fixed for the job's life."""

    factored_axes: FactoredAxes = FactoredAxes.LAST_TWO
    min_dim_size_to_factor: int = 1
    momentum: bool = False
    eps_placement: EpsPlacement = EpsPlacement.ADDED


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A group of parameters: what of its optimizer is fixed when the job begins."""

    adafactor: AdafactorLayout | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One tensor of the model: its name, shape and group."""

    name: str
    shape: tuple[int, ...] = ()
    group: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What a job is: equal for all its workers."""

    parameters: tuple[Parameter, ...]
    groups: tuple[Group, ...]
    slice_bytes: int
    min_workers: int
    recovery: Recovery = Recovery.WORKERS
