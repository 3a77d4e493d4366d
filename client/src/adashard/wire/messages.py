"""The values that travel between processes, as frozen dataclasses.

Each mirrors the message of the same name in `protos/`, field by field; `codec.py` carries one
into the other. Meaning and units of the fields are documented there, in one place.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from adashard.wire.spec import DType, JobSpec, Rounding, WeightDecayMode


class Outcome(enum.IntEnum):
    """How a step ended, on all shards alike."""

    UNSPECIFIED = 0
    APPLY = 1
    SKIP = 2


class Exchange(enum.IntEnum):
    """What the shards of a step tell each other, in this order."""

    UNSPECIFIED = 0
    NORM = 1
    PARTIALS = 2
    CLAMPED = 3


class Content(enum.IntEnum):
    """What of a slice the elements of a run are; WEIGHT is the gradient in a push."""

    UNSPECIFIED = 0
    WEIGHT = 1
    ROW = 2
    COLUMN = 3
    VECTOR = 4
    MOMENTUM = 5


# --- what a step is ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """beta2 and rho for one step count of a parameter."""

    step_count: int
    beta2: float
    rho: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdafactorStep:
    """Adafactor's hyper-parameters of one step."""

    eps1: float
    eps2: float
    clip_threshold: float
    beta1: float = 0.0
    weight_decay: float = 0.0
    weight_decay_mode: WeightDecayMode = WeightDecayMode.ALPHA
    scale_parameter: bool = True
    lr: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStep:
    """A group's settings for one step, with scalars for every step count in it."""

    adafactor: AdafactorStep | None = None
    schedules: tuple[Schedule, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """What slices of one split parameter contribute to the sums over all of it."""

    slice: int
    count: int
    weight_squared_sum: float
    update_squared_sum: float
    least: float
    squares: bytes
    ratios: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a step was; the same bits whoever forms it."""

    step: int
    workers: tuple[str, ...]
    shares: tuple[float, ...]
    outcome: Outcome
    present: bytes
    step_counts: tuple[int, ...]
    groups: tuple[GroupStep, ...]
    squared_norm: float = 0.0
    norm_factor: float = 1.0
    partials: tuple[Partial, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of elements of one slice in a frame's payload; count 0 says something of the rest."""

    slice: int
    start: int
    count: int
    dtype: DType
    content: Content = Content.WEIGHT
    checksum: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How much of a worker's gradient of one slice is in the sum."""

    slice: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """First frame of a push or pull."""

    job: str
    generation: int
    sender: str
    receiver: str
    step: int
    push: bool
    version: int = -1
    present: bytes = b""
    share: float = 1.0
    groups: tuple[GroupStep, ...] = ()
    dtypes: tuple[DType, ...] = (DType.FLOAT32,)
    slices: tuple[int, ...] = ()
    sparse: bytes = b""
    max_grad_norm: float = 0.0
    rounding: Rounding = Rounding.NEAREST
    seed: int = 0
    state: bool = False
    not_finite: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledge:
    """Answers `Begin` at once."""

    version: int
    complete: bool = False
    progress: tuple[Progress, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadBegin:
    """First frame of an upload of whole slices to a shard."""

    job: str
    generation: int
    sender: str
    receiver: str
    version: int
    state: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadReply:
    """How an upload ended."""

    slice_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a shard tells the others when its round is full."""

    job: str
    generation: int
    sender: str
    step: int
    workers: tuple[str, ...]
    finite: bool
    slices: tuple[int, ...]
    squared_sums: tuple[float, ...]
    exchange: Exchange = Exchange.PARTIALS
    partials: tuple[Partial, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeRequest:
    """A report on its way to one shard."""

    receiver: str
    report: Report
    wanted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeResponse:
    """The acknowledgement, with the receiver's own report where it was wanted."""

    report: Report | None = None


# --- membership ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Where a job's weights came from."""

    number: int
    origin: str
    base_version: int = 0
    fingerprint: str = ""
    checkpoint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process in a generation."""

    id: str
    address: str = ""
    rank: int = 0
    leaving: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A job's membership and placement, compared and set as one."""

    job: str
    generation: int
    author: str
    spec: JobSpec
    workers: tuple[Member, ...] = ()
    shards: tuple[Member, ...] = ()
    placement: tuple[int, ...] = ()
    next_rank: int = 0
    lineage: Lineage | None = None
    opened: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a slice is copied from before a generation opens."""

    slice: int
    member: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a generation begins with."""

    entry: Entry
    base: int
    record: Record | None = None
    sources: tuple[Source, ...] = ()
    behind: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorInfo:
    """An error as it travels."""

    reason: str
    message: str
    remedy: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
