"""Fail points: named places where a process can be made to die, to wait, or to lose a message.

Tests of whole clusters place their faults here instead of hoping for them. Everything is off, and
costs one look at a module's variable, unless `ADASHARD_FAILPOINTS` names a folder when the process
starts. A test then arms a fault by putting a file into that folder (`Fault.arm`). The process that
comes to the fault's point takes the file away and does what it says: so a fault happens once, in
one process, and one that is started anew in its place lives.

Points are of three kinds. At a `PLACE` a process dies or waits. At a `MESSAGE`, one may also be
lost or come twice. A `STREAM` is a connection that carries frames in order: a frame cannot get
lost alone, so what is lost there is the rest of the stream, as where a link breaks.
"""

from __future__ import annotations

import enum
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import sleep
from typing import TypeVar

from adashard.wire.errors import ShardUnavailable

VARIABLE = "ADASHARD_FAILPOINTS"

T = TypeVar("T")


class Action(enum.Enum):
    """What happens at a point."""

    KILL = "kill"
    DELAY = "delay"
    DROP = "drop"
    DUPLICATE = "duplicate"


class Kind(enum.Enum):
    """What can happen at a point, beside the death and a pause of the process."""

    PLACE = frozenset({Action.KILL, Action.DELAY})
    STREAM = frozenset({Action.KILL, Action.DELAY, Action.DROP})
    MESSAGE = frozenset(Action)


class Role(enum.Enum):
    """Who passes a point."""

    SHARD = "shard"
    WORKER = "worker"
    COORDINATOR = "coordinator"


@dataclass(frozen=True, slots=True)
class Point:
    """A fail point.

    Attributes:
        roles: of the processes that pass it.
        kind: what can happen there.
        module: the one file that names it.
        says: what has happened when it is passed, and what not yet.
    """

    roles: tuple[Role, ...]
    kind: Kind
    module: str
    says: str


_SHARD, _WORKER, _COORDINATOR = ((role,) for role in Role)
_MEMBER = (Role.SHARD, Role.WORKER)
_PLACE, _STREAM, _MESSAGE = Kind

_SERVICE = "adashard_server/rpc/shard_service.py"
_PEER_CLIENT = "adashard_server/rpc/peer_client.py"
_PEER_SERVICE = "adashard_server/rpc/peer_service.py"
_ENGINE = "adashard_server/shard/engine.py"
_CONTROL = "adashard_server/rpc/coordinator_service.py"
_ATTENDANCE = "adashard/transport/attendance.py"
_STREAMS = "adashard/streams.py"
_SESSION = "adashard/session.py"
_UPLOADS = "adashard/uploads.py"

POINTS: Mapping[str, Point] = {
    # A step.
    "push.begin": Point(_WORKER, _STREAM, _STREAMS, "nothing of a push is sent"),
    "push.frame": Point(_WORKER, _PLACE, _STREAMS, "a frame of a gradient is to be sent"),
    "push.end": Point(_WORKER, _PLACE, _STREAMS, "all its frames are handed to the network"),
    "add.before": Point(_SHARD, _STREAM, _SERVICE, "a frame of a gradient is here"),
    "add.after": Point(_SHARD, _STREAM, _SERVICE, "it is in the sum, or waits for its turn"),
    "report.sent": Point(_SHARD, _MESSAGE, _PEER_CLIENT, "a report is to be sent to one peer"),
    "report.received": Point(_SHARD, _STREAM, _PEER_SERVICE, "a peer's report is here"),
    "report.answered": Point(_SHARD, _STREAM, _PEER_SERVICE, "it counts; the answer is to be sent"),
    "commit": Point(_SHARD, _PLACE, _ENGINE, "a step is decided, and no slice has taken it"),
    "apply": Point(_SHARD, _PLACE, _ENGINE, "a slice has taken it"),
    "reply.record": Point(_SHARD, _STREAM, _SERVICE, "the first frame of a reply is to be sent"),
    "reply.frame": Point(_SHARD, _STREAM, _SERVICE, "a frame with weights is to be sent"),
    "reply.end": Point(_SHARD, _STREAM, _SERVICE, "the last is handed to the network"),
    "reply.received": Point(_WORKER, _STREAM, _STREAMS, "a frame of a reply is here, not written"),
    "step.taken": Point(_WORKER, _PLACE, _SESSION, "a worker has all slices of the step"),
    # A change of generation.
    "swap.before": Point(_COORDINATOR, _PLACE, _CONTROL, "a generation is made, not written"),
    "swap.after": Point(_COORDINATOR, _PLACE, _CONTROL, "it is written, and nobody knows of it"),
    "freeze.sent": Point(_COORDINATOR, _MESSAGE, _CONTROL, "a member is to be asked to freeze"),
    "freeze.received": Point(_MEMBER, _MESSAGE, _ATTENDANCE, "it has heard, and promised nothing"),
    "frozen.sent": Point(_MEMBER, _MESSAGE, _ATTENDANCE, "it has promised, and is to say so"),
    "frozen.received": Point(_COORDINATOR, _MESSAGE, _CONTROL, "its answer is here"),
    "planrequest.sent": Point(_COORDINATOR, _MESSAGE, _CONTROL, "a member is to be sent the plan"),
    "planrequest.received": Point(_MEMBER, _MESSAGE, _ATTENDANCE, "it has the plan"),
    "upload.frame": Point(_WORKER, _PLACE, _UPLOADS, "a frame of an upload is to be sent"),
    "upload.received": Point(_SHARD, _STREAM, _SERVICE, "it is here, and not taken"),
    "planned.sent": Point(_SHARD, _MESSAGE, _ATTENDANCE, "a shard has what the plan gives it"),
    "planned.received": Point(_COORDINATOR, _MESSAGE, _CONTROL, "it has said so"),
    "open.sent": Point(_COORDINATOR, _MESSAGE, _CONTROL, "a member is to be told to go on"),
    "open.received": Point(_MEMBER, _MESSAGE, _ATTENDANCE, "it has heard"),
    "opened.sent": Point(_MEMBER, _MESSAGE, _ATTENDANCE, "it goes on, and is to say so"),
}
"""All fail points there are. A test holds the code to it: each is named once, in its module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is to happen, and where.

    Attributes:
        point: where.
        action: what.
        passing: at which passing of the point by the process, counted from 1 since it was armed.
        pids: by which processes; none for the first one that has passed so often.
        delay_s: how long a delay is.
    """

    point: str
    action: Action
    passing: int = 1
    pids: tuple[int, ...] = ()
    delay_s: float = 0.5

    def __post_init__(self) -> None:
        if self.action not in POINTS[self.point].kind.value:
            raise ValueError(f"{self.action.value} cannot happen at {self.point}")

    def is_for(self, point: str, pid: int) -> bool:
        """Whether a process that passes `point` brings it nearer."""
        return self.point == point and (not self.pids or pid in self.pids)

    def arm(self, folder: Path, name: str) -> Armed:
        """Has it happen once, in one of the processes that were started with `folder`.

        Args:
            folder: the one that their environment names.
            name: unlike that of any fault armed there before.
        """
        armed = Armed(folder, name)
        text = json.dumps({**asdict(self), "action": self.action.value})
        _write(armed.file, text)
        return armed


@dataclass(frozen=True, slots=True)
class Armed:
    """A fault that will happen, or has."""

    folder: Path
    name: str

    @property
    def file(self) -> Path:
        """Is there as long as nothing has happened."""
        return self.folder / f"{self.name}.armed"

    @property
    def happened_s(self) -> float | None:
        """When it happened, on `time.monotonic`'s clock; None if it has not."""
        try:
            return float((self.folder / f"{self.name}.happened").read_text())
        except FileNotFoundError:
            return None

    def disarm(self) -> None:
        """It will not happen any more."""
        self.file.unlink(missing_ok=True)

    def take(self) -> bool:
        """Whether it is for the caller, which does it at once, and for nobody else."""
        try:
            self.file.rename(self.folder / f"{self.name}.taken")
        except FileNotFoundError:
            return False
        _write(self.folder / f"{self.name}.happened", repr(time.monotonic()))
        return True


def reach(point: str) -> None:
    """Marks a place, or a frame of a stream; returns if this process lives on.

    Raises:
        ShardUnavailable: the stream has broken.
    """
    if _trigger is not None and _trigger.pull(point) is Action.DROP:
        raise ShardUnavailable(f"fail point {point}: the stream has broken")


def sent(message: T) -> tuple[T, ...]:
    """How a control message is sent: see `copies`. Its point is named after its class."""
    return copies(f"{type(message).__name__.lower()}.sent", message)


def received(message: T) -> tuple[T, ...]:
    """How a control message is received: see `copies`. Its point is named after its class."""
    return copies(f"{type(message).__name__.lower()}.received", message)


def copies(point: str, message: T) -> tuple[T, ...]:
    """How a message passes: usually once, but lost or doubled where a test wants it so."""
    if _trigger is None:
        return (message,)
    match _trigger.pull(point):
        case Action.DROP:
            return ()
        case Action.DUPLICATE:
            return (message, message)
        case _:
            return (message,)


class Trigger:
    """Looks in the folder whether something is to happen. Thread-safe.

    Args:
        folder: where faults are armed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._passed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def pull(self, point: str) -> Action | None:
        """The process has come to a point. A lost or doubled message is for the caller to do."""
        fault = self._due(point)
        if fault is None:
            return None
        if fault.action is Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.action is Action.DELAY:
            sleep(fault.delay_s)
        return fault.action

    def _due(self, point: str) -> Fault | None:
        """The fault that happens now, if any; at most one."""
        for file in sorted(self._folder.glob("*.armed")):
            armed = Armed(self._folder, file.stem)
            fault = _read(armed)
            if fault is not None and fault.is_for(point, os.getpid()):
                with self._lock:
                    self._passed[armed.name] += 1
                    due = self._passed[armed.name] >= fault.passing
                if due and armed.take():
                    return fault
        return None


def _read(armed: Armed) -> Fault | None:
    try:
        fields = json.loads(armed.file.read_text())
    except FileNotFoundError:  # another process has taken it meanwhile
        return None
    return Fault(**{**fields, "action": Action(fields["action"]), "pids": tuple(fields["pids"])})


def _write(file: Path, text: str) -> None:
    """Whoever sees the file sees all of it."""
    draft = file.with_suffix(".draft")
    draft.write_text(text)
    draft.rename(file)


_trigger = Trigger(Path(os.environ[VARIABLE])) if os.environ.get(VARIABLE) else None
