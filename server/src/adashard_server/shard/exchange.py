"""The exchange between shards: one report each, direct, once a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from adashard.wire.errors import AdashardError
from adashard.wire.messages import ExchangeRequest, ExchangeResponse, Member, Report

Answer = Callable[[ExchangeRequest], ExchangeResponse]


class PeerExchange(Protocol):
    """Carries reports to other shards. Best effort: what is lost, the sender repeats."""

    def send(
        self, peer: Member, request: ExchangeRequest, deliver: Callable[[Report], None]
    ) -> None:
        """Hands `request` to `peer`; never blocks on it and never raises.

        Args:
            peer: who, and where it serves.
            request: the report, and whether the peer's own is wanted.
            deliver: called with the peer's report if it comes back, from any thread.
        """

    def close(self) -> None:
        """Ends what is under way. Idempotent."""


class MemoryExchange:
    """Peers of the same process, by id: for clusters in one process and for tests."""

    def __init__(self) -> None:
        self._peers: dict[str, Answer] = {}

    def attach(self, shard: str, answer: Answer) -> None:
        """Makes `shard` reachable; `answer` is what its peer service does with a request."""
        self._peers[shard] = answer

    def detach(self, shard: str) -> None:
        """Makes `shard` unreachable. Idempotent."""
        self._peers.pop(shard, None)

    def send(
        self, peer: Member, request: ExchangeRequest, deliver: Callable[[Report], None]
    ) -> None:
        """See `PeerExchange.send`; the caller must hold no lock, since the peer answers at once."""
        answer = self._peers.get(peer.id)
        if answer is None:
            return
        try:
            response = answer(request)
        except AdashardError:
            return  # the peer is in another generation; the sender repeats
        if response.report is not None:
            deliver(response.report)

    def close(self) -> None:
        """Forgets all peers."""
        self._peers.clear()
