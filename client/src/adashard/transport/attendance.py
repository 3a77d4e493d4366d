"""A member's control stream to the coordinator, kept open as long as the member lives.

Workers and shards alike are members: they say hello, renew, and answer what the coordinator asks.
A stream that breaks is opened anew with the same id, which revives the member.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator

from adashard import failpoints
from adashard.retry import Backoff, repeatable
from adashard.transport.base import ControlCall, Transport
from adashard.wire.control import FromCoordinator, FromMember, Hello, Renewal, Welcome
from adashard.wire.errors import AdashardError, CannotReachServer, Internal

log = logging.getLogger("adashard.membership")

CONNECT_BUDGET_S = 10.0
RECONNECT_S = (
    0.5  # at most between two tries of a member: a coordinator that is back has its leases
)
_RENEW_S = 1.0


class Attendance:
    """Keeps the control stream of one member open, from a thread of its own.

    Args:
        transport: carries the stream.
        address: host:port of the coordinator.
        hello: makes the first message of every stream.
        renewal: makes the message that says where the member stands; called about once a second.
        handle: takes every message, in order, in the stream's thread.
        failed: called once, when the coordinator could never be reached or has refused for good.
        connect_budget_s: seconds to try before the first stream stands.
    """

    def __init__(
        self,
        transport: Transport,
        address: str,
        *,
        hello: Callable[[], Hello],
        renewal: Callable[[], Renewal],
        handle: Callable[[FromCoordinator], None],
        failed: Callable[[AdashardError], None],
        connect_budget_s: float = CONNECT_BUDGET_S,
    ) -> None:
        self._transport = transport
        self._address = address
        self._hello, self._renewal = hello, renewal
        self._handle, self._failed = handle, failed
        self._connect_budget_s = connect_budget_s
        self._renew_s = _RENEW_S
        self._outbox: queue.SimpleQueue[FromMember | None] = queue.SimpleQueue()
        self._call: ControlCall | None = None
        self._welcomed = False  # ever
        self._stood = False  # the stream at hand
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adashard-control", daemon=True)

    def start(self) -> None:
        """Begins to connect; returns at once."""
        self._thread.start()

    def send(self, message: FromMember) -> None:
        """Queues a message, from any thread; it is dropped if the stream breaks first."""
        for one in failpoints.sent(message):
            self._outbox.put(one)

    def renew(self) -> None:
        """Says at once where the member stands."""
        self.send(self._renewal())

    def close(self) -> None:
        """Ends the stream; the coordinator takes that for the member's end. Idempotent."""
        self._closed.set()
        self._outbox.put(None)
        if self._call is not None:
            self._call.cancel()
        if self._thread.ident and threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        backoff = Backoff(self._connect_budget_s, time.monotonic)
        while not self._closed.is_set():
            self._stood = False
            try:
                self._attend()
                error: AdashardError = CannotReachServer(f"{self._address} closed the stream")
            except AdashardError as raised:
                error = raised
            except Exception as defect:
                # Dying silently would leave the member's other threads waiting for ever.
                log.exception("a message of the coordinator could not be handled")
                error = Internal(f"a message of the coordinator could not be handled: {defect}")
            if self._closed.is_set():
                return
            if self._stood:
                backoff = Backoff(self._connect_budget_s, time.monotonic, longest_s=RECONNECT_S)
                log.warning("lost the coordinator; trying again: %s", error.message)
            wait_s = backoff.next_s()
            if not repeatable(error) or (wait_s is None and not self._welcomed):
                self._failed(_unreached(error, self._address, backoff))
                return
            self._closed.wait(backoff.longest_s if wait_s is None else wait_s)

    def _attend(self) -> None:
        """One stream, from hello to its end."""
        outbox: queue.SimpleQueue[FromMember | None] = queue.SimpleQueue()
        self._outbox = outbox
        self._call = call = self._transport.attend(self._address, self._messages(outbox))
        if self._closed.is_set():
            call.cancel()
        try:
            for message in call:
                if isinstance(message, Welcome):
                    self._welcomed = self._stood = True
                    self._renew_s = message.renew_s
                for one in failpoints.received(message):
                    self._handle(one)
        finally:
            outbox.put(None)

    def _messages(self, outbox: queue.SimpleQueue[FromMember | None]) -> Iterator[FromMember]:
        """Hello, and then what is queued, with renewals in between."""
        yield self._hello()
        yield self._renewal()
        while True:
            try:
                message = outbox.get(timeout=self._renew_s)
            except queue.Empty:
                message = self._renewal()
            if message is None:
                return
            yield message


def _unreached(error: AdashardError, address: str, backoff: Backoff) -> AdashardError:
    """The error with what was tried."""
    if not isinstance(error, CannotReachServer):
        return error
    return CannotReachServer(
        f"no adashard server at {address} ({backoff.attempts} tries in {backoff.spent_s:.1f} s: "
        f"{error.message})",
        address=address,
        attempts=backoff.attempts,
        seconds=round(backoff.spent_s, 1),
    )
