"""The catalogue of errors that a caller can meet.

Each class says what went wrong and what to do about it, carries its facts as fields, and has a
code that is neutral between transports: `rpc/` reads a gRPC status off it, `http/` an HTTP status.
Over the wire an error is (reason, message, remedy, facts); `from_info` finds the class again.

    AdashardError
    ├── InvalidRequest       400   settings or a message that cannot be right
    │   ├── InvalidSettings        hyper-parameters that contradict each other
    │   ├── InvalidFrame           a frame that is malformed, truncated or over a limit
    │   │   └── DamagedFrame 503   bytes that are not those that were sent
    │   └── UnsupportedParameter   a parameter that cannot be trained here
    ├── InvalidGradient      400   a gradient that cannot be sent
    │   └── NotFinite              one with NaN or Inf in it
    ├── UnknownJob           404
    ├── LeaseExpired         404   the session is no longer part of the job
    ├── Evicted              400   the job goes on without this worker
    ├── JobExists            409   the job exists and this call must not join it
    ├── ModelMismatch        409   the job was registered with another model or other settings
    ├── StaleGeneration      409   membership has changed: fetch the placement, push again
    ├── VersionSkew          400   client and server are too far apart
    ├── JobLost              500   the state of a job is gone
    ├── CheckpointUnreadable 500   a checkpoint is not there, incomplete or damaged
    ├── CheckpointUnwritable 400   a checkpoint cannot be written
    ├── ShardUnavailable     503   nobody answers at a shard's address
    ├── CannotReachServer    503   nobody answers at the coordinator's address
    ├── Draining             503   the process is going away
    ├── Overloaded           429   a stated limit is reached
    ├── PortInUse            409   an address cannot be listened on
    ├── StepTimedOut         504   an answer did not come in time
    ├── Unauthenticated      401
    └── Internal             500   a defect; the server's log has the traceback
"""

from __future__ import annotations

import enum
from typing import ClassVar

from adashard.wire.messages import ErrorInfo


class Code(enum.Enum):
    """Neutral status of an error; the names are those of gRPC."""

    INVALID_ARGUMENT = enum.auto()
    FAILED_PRECONDITION = enum.auto()
    UNAUTHENTICATED = enum.auto()
    NOT_FOUND = enum.auto()
    ALREADY_EXISTS = enum.auto()
    ABORTED = enum.auto()
    RESOURCE_EXHAUSTED = enum.auto()
    INTERNAL = enum.auto()
    DATA_LOSS = enum.auto()
    UNAVAILABLE = enum.auto()
    DEADLINE_EXCEEDED = enum.auto()


class AdashardError(Exception):
    """Base of everything that adashard raises on purpose.

    Attributes:
        message: what happened, and where.
        remedy: what to do about it.
        facts: the same as fields, for programs.
    """

    code: ClassVar[Code] = Code.INTERNAL
    http_status: ClassVar[int] = 500
    default_remedy: ClassVar[str] = ""

    def __init__(self, message: str, *, remedy: str | None = None, **facts: object) -> None:
        self.message = message
        self.remedy = self.default_remedy if remedy is None else remedy
        self.facts = {name: str(value) for name, value in facts.items()}
        super().__init__(f"{message}\n  {self.remedy}" if self.remedy else message)

    @property
    def reason(self) -> str:
        """Name of the class: the stable identity of the error on the wire."""
        return type(self).__name__

    def info(self) -> ErrorInfo:
        """The error as it travels."""
        return ErrorInfo(
            reason=self.reason, message=self.message, remedy=self.remedy, metadata=self.facts
        )

    def __reduce__(self) -> tuple[object, ...]:
        return from_info, (self.info(),)


class InvalidRequest(AdashardError):
    """Something that cannot be right was asked for."""

    code = Code.INVALID_ARGUMENT
    http_status = 400
    default_remedy = "Correct the request; repeating it does not help."


class InvalidSettings(InvalidRequest, ValueError):
    """Settings that contradict each other, or have no meaning."""

    default_remedy = "Change one of the settings named."


class InvalidFrame(InvalidRequest):
    """A frame that is malformed, truncated or over a limit. Nothing of it was applied."""

    default_remedy = "Use the client of the same version as the server; report a defect if it is."


class DamagedFrame(InvalidFrame):
    """Bytes that are not those that were sent: their checksum is wrong. None of them is used."""

    code = Code.UNAVAILABLE
    http_status = 503
    default_remedy = (
        "The call is repeated. If it goes on, a network device or a memory turns bits: replace it."
    )


class UnsupportedParameter(InvalidRequest):
    """A parameter that cannot be trained here: not floating point, sparse, or too large."""

    default_remedy = "Leave it out of the optimizer (requires_grad=False), or convert it."


class InvalidGradient(AdashardError):
    """A gradient that cannot be sent: neither dense nor in rows. The weights are untouched."""

    code = Code.INVALID_ARGUMENT
    http_status = 400
    default_remedy = "Look at the tensors named; nothing was sent, and step() may be called again."


class NotFinite(InvalidGradient):
    """A gradient with NaN or Inf in it. Nothing was sent, and the weights are untouched."""

    default_remedy = (
        "Look at the tensors named: at their data, their loss or the learning rate. step() may be "
        "called again; skip_step() takes part in the step without a gradient; nonfinite='skip' "
        "has the whole job skip such steps."
    )


class UnknownJob(AdashardError):
    """There is no job of this name."""

    code = Code.NOT_FOUND
    http_status = 404
    default_remedy = (
        "GET /api/v1/jobs lists the jobs; a job begins with the first step() of a worker."
    )


class LeaseExpired(AdashardError):
    """The session is no longer part of the job."""

    code = Code.NOT_FOUND
    http_status = 404
    default_remedy = "Call step() again: it joins anew and adopts the job's weights."


class Evicted(AdashardError):
    """The job goes on without this worker, because of what it did."""

    code = Code.FAILED_PRECONDITION
    http_status = 400
    default_remedy = "Look for the cause on this worker; step() joins anew, as a new worker."


class JobExists(AdashardError):
    """The job exists, and this call must not join it."""

    code = Code.ALREADY_EXISTS
    http_status = 409
    default_remedy = "Choose another job=, or on_existing='resume' to join it where it stands."


class ModelMismatch(AdashardError):
    """The job was registered with another model or with other settings."""

    code = Code.ALREADY_EXISTS
    http_status = 409
    default_remedy = "Build the same model on every worker, or choose another job=."


class StaleGeneration(AdashardError):
    """Membership or placement has changed since the call was made."""

    code = Code.ABORTED
    http_status = 409
    default_remedy = "Fetch the placement and push again; the client does this by itself."


class VersionSkew(AdashardError):
    """Client and server are too far apart in version."""

    code = Code.FAILED_PRECONDITION
    http_status = 400
    default_remedy = "Install the same adashard version on both sides."


class JobLost(AdashardError):
    """State of the job is gone with the process that held it."""

    code = Code.DATA_LOSS
    http_status = 500
    default_remedy = "Begin again with on_existing='replace', from your own saved weights."


class CheckpointUnreadable(AdashardError):
    """A checkpoint is not there, not complete, damaged, or of a format that is not known here."""

    code = Code.DATA_LOSS
    http_status = 500
    default_remedy = (
        "`adashard checkpoint list` shows the others, and `adashard checkpoint verify` which of "
        "them are whole."
    )


class CheckpointUnwritable(AdashardError):
    """A checkpoint cannot be written: no room, no permission, or no directory. Steps go on."""

    code = Code.FAILED_PRECONDITION
    http_status = 400
    default_remedy = (
        "Make room in the directory named, or give the processes write permission there; the next "
        "checkpoint is tried when it is due."
    )


class ShardUnavailable(AdashardError):
    """Nobody answers at a shard's address."""

    code = Code.UNAVAILABLE
    http_status = 503
    default_remedy = "Check that the shard runs and that its --advertise address is reachable."


class CannotReachServer(AdashardError):
    """Nobody answers at the coordinator's address."""

    code = Code.UNAVAILABLE
    http_status = 503
    default_remedy = (
        "Is it running? `adashard status`, or `docker compose up -d`. "
        "In a container localhost is the container itself: set ADASHARD_ADDRESS=coordinator:50051."
    )


class Draining(AdashardError):
    """The process is going away and takes nothing new."""

    code = Code.UNAVAILABLE
    http_status = 503
    default_remedy = "Wait for its successor; the client repeats the call by itself."


class Overloaded(AdashardError):
    """A stated limit is reached."""

    code = Code.RESOURCE_EXHAUSTED
    http_status = 429
    default_remedy = "Use fewer members, or raise the limit named."


class PortInUse(AdashardError):
    """An address cannot be listened on."""

    code = Code.ALREADY_EXISTS
    http_status = 409
    default_remedy = (
        "Stop the process that listens there, or choose another --port (0 for a free one)."
    )


class StepTimedOut(AdashardError):
    """An answer did not come in time; the outcome is unknown."""

    code = Code.DEADLINE_EXCEEDED
    http_status = 504
    default_remedy = "Call step() again: a repeated push is not applied twice."


class Unauthenticated(AdashardError):
    """No token, or a wrong one."""

    code = Code.UNAUTHENTICATED
    http_status = 401
    default_remedy = "Set ADASHARD_TOKEN to the cluster's token."


class Internal(AdashardError):
    """A defect of adashard."""

    default_remedy = "The server's log has the traceback; please report it."


def catalogue() -> dict[str, type[AdashardError]]:
    """All classes by their reason."""
    found: dict[str, type[AdashardError]] = {}
    todo: list[type[AdashardError]] = [AdashardError]
    while todo:
        kind = todo.pop()
        found[kind.__name__] = kind
        todo.extend(kind.__subclasses__())
    return found


def from_info(info: ErrorInfo) -> AdashardError:
    """The error that `info` describes; `Internal` where this version does not know its class."""
    error = catalogue().get(info.reason, Internal)(info.message, remedy=info.remedy)
    error.facts = dict(info.metadata)
    return error
