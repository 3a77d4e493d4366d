"""What a session and a server process ask of a transport."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from adashard.wire.control import FromCoordinator, FromMember
from adashard.wire.messages import UploadReply


class Call(Protocol):
    """A stream under way. Iterating it raises classes of the catalogue only."""

    def __iter__(self) -> Iterator[bytes]:
        """The frames that come back."""

    def cancel(self) -> None:
        """Ends it from this side, from any thread; idempotent."""


class ControlCall(Protocol):
    """A control stream under way."""

    def __iter__(self) -> Iterator[FromCoordinator]:
        """What the coordinator says."""

    def cancel(self) -> None:
        """Ends it from this side, from any thread; idempotent."""


class Transport(Protocol):
    """Carries calls to servers by address (host:port). Thread-safe."""

    def attend(self, address: str, messages: Iterator[FromMember]) -> ControlCall:
        """Opens a control stream; `messages` is drained by a thread of the transport's."""

    def push_pull(self, address: str, frames: Iterable[bytes]) -> Call:
        """Opens a stream to a shard; `frames` is drained by a thread of the transport's."""

    def upload(self, address: str, frames: Iterable[bytes]) -> UploadReply:
        """Sends whole slices to a shard; returns when they are there.

        Raises:
            ShardUnavailable: nobody answers.
            StaleGeneration: the plan that named the sender has been replaced.
        """

    def close(self) -> None:
        """Ends everything under way. Idempotent."""
