"""The control plane: control streams in, the coordinator's instructions out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable

from grpc import aio

from adashard.wire import codec
from adashard.wire.control import Bye, FromCoordinator, FromMember, Hello, Logged, StepSummary
from adashard.wire.errors import AdashardError, InvalidRequest
from adashard.wire.messages import Entry
from adashard.wire.v1.coordinator_pb2 import AttendRequest, AttendResponse
from adashard.wire.v1.coordinator_pb2_grpc import CoordinatorServiceServicer
from adashard_server.cluster.coordinator import Coordinator, refusal
from adashard_server.cluster.instructions import (
    Announce,
    HangUp,
    Instruction,
    StepDown,
    Swap,
    Tell,
)
from adashard_server.cluster.registry import Registry

log = logging.getLogger("adashard.membership")

TICK_S = 0.1
OUTBOX_MAX = 1000
_RETRY_S = 1.0
_FOREVER = 2**31 - 1  # above every generation: the member is told to go whatever it has promised

Telemetry = StepSummary | Logged
_Outbox = asyncio.Queue[FromCoordinator | None]


class CoordinatorService(CoordinatorServiceServicer):
    """Feeds a coordinator and carries out what it says; all in one event loop.

    Args:
        coordinator: decides.
        registry: keeps; called in threads, since it may block.
        clock: the coordinator's, in seconds.
        announce: takes what people should know.
        observe: takes telemetry, with the id of the member that sent it.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        registry: Registry,
        clock: Callable[[], float],
        announce: Callable[[Announce], None],
        observe: Callable[[str, Telemetry], None],
    ) -> None:
        self._coordinator = coordinator
        self._registry = registry
        self._clock = clock
        self._announce, self._observe = announce, observe
        self._outboxes: dict[str, _Outbox] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Ticks until cancelled."""
        while True:
            self._carry_out(self._coordinator.tick(self._clock()))
            await asyncio.sleep(TICK_S)

    def hang_up(self) -> None:
        """Ends all control streams, so that the server can stop."""
        for outbox in self._outboxes.values():
            _put(outbox, None)

    async def Attend(
        self,
        request_iterator: AsyncIterator[AttendRequest],
        context: aio.ServicerContext[AttendRequest, AttendResponse],
    ) -> AsyncIterator[AttendResponse]:
        """See protos/adashard/wire/v1/coordinator.proto."""
        try:
            hello = await _hello(request_iterator)
        except AdashardError as error:
            yield codec.pack(Bye(job="", generation=_FOREVER, error=error.info()))
            return
        outbox: _Outbox = asyncio.Queue(OUTBOX_MAX)
        try:
            instructions = self._coordinator.hello(hello, self._clock())
        except AdashardError as error:
            yield codec.pack(refusal(hello, error))
            return
        if (before := self._outboxes.get(hello.id)) is not None:
            _put(before, None)
        self._outboxes[hello.id] = outbox
        self._carry_out(instructions)
        reader = asyncio.create_task(self._read(hello.id, request_iterator, outbox))
        try:
            while (message := await outbox.get()) is not None:
                yield codec.pack(message)
        finally:
            reader.cancel()
            if self._outboxes.get(hello.id) is outbox:
                del self._outboxes[hello.id]
                self._carry_out(self._coordinator.detached(hello.id, self._clock()))

    async def _read(
        self, member: str, requests: AsyncIterator[AttendRequest], outbox: _Outbox
    ) -> None:
        """What a member says, until its stream ends."""
        try:
            async for request in requests:
                message = codec.unpack(request)
                if isinstance(message, Telemetry):
                    self._observe(member, message)
                self._carry_out(self._coordinator.handle(member, message, self._clock()))
        except AdashardError as error:
            log.warning("member %s is cut off: %s", member, error.message)
            _put(outbox, Bye(job="", generation=_FOREVER, error=error.info()))
        except aio.AioRpcError as error:
            log.debug("the stream of member %s broke: %s", member, error.code())
        except Exception:
            log.exception("a message of member %s could not be handled", member)
        finally:
            _put(outbox, None)

    def _carry_out(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Tell(member=member, message=message):
                    self._tell(member, message)
                case HangUp(member=member):
                    self._tell(member, None)
                case Swap():
                    self._start(self._swap(instruction))
                case Announce():
                    self._announce(instruction)
                case StepDown(reason=reason):
                    if not self.ended.done():
                        self.ended.set_result(reason)

    def _tell(self, member: str, message: FromCoordinator | None) -> None:
        outbox = self._outboxes.get(member)
        if outbox is not None:
            _put(outbox, message)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _swap(self, swap: Swap) -> None:
        """Writes an entry, however long it takes to reach the registry.

        After a lost answer the write is repeated: it then fails, and the stored author says
        whether the first had arrived.
        """
        job = swap.entry.job
        while True:
            try:
                done = await asyncio.to_thread(
                    self._registry.swap, swap.entry, expected=swap.expected
                )
                stored: Entry | None = None
                if not done:
                    stored = await asyncio.to_thread(self._registry.read, job)
                break
            except AdashardError as error:
                log.warning("the registry does not answer; trying again: %s", error.message)
                await asyncio.sleep(_RETRY_S)
        self._carry_out(self._coordinator.swapped(job, done, stored, self._clock()))


async def _hello(requests: AsyncIterator[AttendRequest]) -> Hello:
    message: FromMember | None = None
    async for request in requests:
        message = codec.unpack(request)
        break
    if not isinstance(message, Hello):
        raise InvalidRequest(f"a control stream begins with Hello, not {type(message).__name__}")
    return message


def _put(outbox: _Outbox, message: FromCoordinator | None) -> None:
    """Queues a message; a member that does not read is cut off instead of filling memory."""
    if outbox.full():
        while not outbox.empty():
            outbox.get_nowait()
        message = None
    outbox.put_nowait(message)
