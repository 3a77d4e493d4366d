"""Carries one job's reports to the other shards and theirs to the rounds."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from adashard.wire.errors import AdashardError, InvalidRequest, StaleGeneration
from adashard.wire.messages import ExchangeRequest, ExchangeResponse, Report
from adashard_server.shard.exchange import PeerExchange
from adashard_server.shard.instructions import Instruction, Send
from adashard_server.shard.rounds import Rounds
from adashard_server.shard.stopwatch import Stopwatch

log = logging.getLogger("adashard.rounds")


class Reports:
    """The reports of one job on one shard. Thread-safe.

    Args:
        rounds: decide what is sent, and what a report of another shard leads to.
        turn: the lock that covers rounds and stopwatch.
        exchange: brings reports to other shards.
        stopwatch: is told when the first has left.
        carry_out: does what the rounds say; called without the lock.

    Attributes:
        refused_count: reports that were not believed.
    """

    def __init__(
        self,
        rounds: Rounds,
        turn: threading.Condition,
        exchange: PeerExchange,
        stopwatch: Stopwatch,
        carry_out: Callable[[Sequence[Instruction]], None],
    ) -> None:
        self.refused_count = 0
        self._rounds, self._turn = rounds, turn
        self._exchange, self._stopwatch = exchange, stopwatch
        self._carry_out = carry_out

    def send(self, send: Send) -> None:
        """Hands a report to other shards; what they answer comes when it comes."""
        with self._turn:
            entry = self._rounds.entry
            self._stopwatch.reported(send.report.step)
        assert entry is not None
        members = {member.id: member for member in entry.shards}
        peers = [members[peer] for peer in send.peers]
        self._exchange.send(send.report, peers, send.wanted, self._take_quietly)

    def answer(self, request: ExchangeRequest) -> ExchangeResponse:
        """Takes another shard's report; answers with the own one where it is wanted and there.

        Raises:
            StaleGeneration: the report is of another generation.
            InvalidRequest: it is not one that its sender can have made.
        """
        report = request.report
        self._take(report)
        with self._turn:
            own = self._rounds.own_report(report.step, report.exchange) if request.wanted else None
        return ExchangeResponse(report=own)

    def repeat(self) -> None:
        """Sends again what has not been answered; to be called now and then."""
        with self._turn:
            instructions = self._rounds.repeat()
        self._carry_out(instructions)

    def refuse(self, why: str) -> None:
        """Counts a report that is not believed; late ones are usual when a generation changes."""
        with self._turn:
            self.refused_count += 1
        log.info("%s", why)

    def _take(self, report: Report) -> None:
        try:
            with self._turn:
                instructions = self._rounds.exchange(report)
        except AdashardError as error:
            self.refuse(f"job {report.job!r}: {error.message}")
            raise
        self._carry_out(instructions)

    def _take_quietly(self, report: Report) -> None:
        with suppress(StaleGeneration, InvalidRequest):  # counted and logged
            self._take(report)
