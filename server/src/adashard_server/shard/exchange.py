"""The exchange between shards: one report each, direct, once a step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from adashard.wire.errors import AdashardError
from adashard.wire.messages import ExchangeRequest, ExchangeResponse, Member, Report

Answer = Callable[[ExchangeRequest], ExchangeResponse]


class PeerExchange(Protocol):
    """Carries reports to other shards. Best effort: what is lost, the sender repeats."""

    def send(
        self,
        report: Report,
        peers: Sequence[Member],
        wanted: Collection[str],
        deliver: Callable[[Report], None],
    ) -> None:
        """Hands a report to each of the peers; never blocks on them and never raises.

        Args:
            report: what they are told.
            peers: who, and where they serve.
            wanted: ids of those whose own report is wanted.
            deliver: called with a peer's report if it comes back, from any thread.
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
        self,
        report: Report,
        peers: Sequence[Member],
        wanted: Collection[str],
        deliver: Callable[[Report], None],
    ) -> None:
        """See `PeerExchange.send`; the caller must hold no lock, since the peers answer at once."""
        for peer in peers:
            request = ExchangeRequest(receiver=peer.id, report=report, wanted=peer.id in wanted)
            response = self._answer(request)
            if response.report is not None:
                deliver(response.report)

    def close(self) -> None:
        """Forgets all peers."""
        self._peers.clear()

    def _answer(self, request: ExchangeRequest) -> ExchangeResponse:
        answer = self._peers.get(request.receiver)
        if answer is None:
            return ExchangeResponse()
        try:
            return answer(request)
        except AdashardError:
            return ExchangeResponse()  # it is in another generation; the sender repeats
