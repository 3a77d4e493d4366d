"""The control plane: control streams in, the coordinator's instructions out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from operator import methodcaller

from grpc import aio

from adashard import failpoints
from adashard.wire import codec
from adashard.wire.control import Bye, FromCoordinator, FromMember, Hello, Logged, StepSummary
from adashard.wire.errors import AdashardError, Internal, InvalidRequest
from adashard.wire.messages import Entry
from adashard.wire.v1.coordinator_pb2 import AttendRequest, AttendResponse
from adashard.wire.v1.coordinator_pb2_grpc import CoordinatorServiceServicer
from adashard_server.cluster.coordinator import FOREVER, Coordinator, refusal
from adashard_server.cluster.instructions import (
    Announce,
    Commit,
    Discard,
    HangUp,
    Instruction,
    Keep,
    Remove,
    StepDown,
    Swap,
    Tell,
)
from adashard_server.cluster.registry import Registry
from adashard_server.rpc.registry_calls import RegistryCalls

log = logging.getLogger("adashard.membership")

TICK_S = 0.1
OUTBOX_MAX = 1000

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
        keep: does what is to be done in the directory of checkpoints; called in threads.

    Attributes:
        registry: asks the registry, and waits while it does not answer.
        ended: why this coordinator has to end, once it has to; raises if that is a defect.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        registry: Registry,
        clock: Callable[[], float],
        announce: Callable[[Announce], None],
        observe: Callable[[str, Telemetry], None],
        keep: Callable[[Keep], None],
    ) -> None:
        self._coordinator = coordinator
        self.registry = RegistryCalls(registry, self._registry_gone, self._registry_back)
        self._clock = clock
        self._announce, self._observe, self._keep = announce, observe, keep
        self._outboxes: dict[str, _Outbox] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Ticks until cancelled, or until a defect ends this coordinator."""
        looked = self._clock()
        while not self.ended.done():
            if self._clock() - looked >= self._coordinator.settings.lease_s / 3:
                looked = self._clock()
                self._start(self._look_up())
            try:
                self._carry_out(self._coordinator.tick(self._clock()))
            except Exception as defect:
                self._fail(defect)
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
            yield codec.pack(Bye(job="", generation=FOREVER, error=error.info()))
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
                for one in failpoints.received(message):
                    self._carry_out(self._coordinator.handle(member, one, self._clock()))
        except AdashardError as error:
            log.warning("member %s is cut off: %s", member, error.message)
            _put(outbox, Bye(job="", generation=FOREVER, error=error.info()))
        except aio.AioRpcError as error:
            log.debug("the stream of member %s broke: %s", member, error.code())
        except Exception as defect:
            # It would say the same again, and the others would wait for its answer for ever.
            log.exception("a message of member %s could not be handled", member)
            reason = Internal(f"a message of it could not be handled: {defect!r}")
            self._carry_out(self._coordinator.evict(member, reason, self._clock()))
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
                case Commit() | Discard() | Remove():
                    self._start(self._do_keep(instruction))
                case StepDown(reason=reason):
                    if not self.ended.done():
                        self.ended.set_result(reason)

    def _tell(self, member: str, message: FromCoordinator | None) -> None:
        outbox = self._outboxes.get(member)
        if outbox is not None:
            for one in failpoints.sent(message):
                _put(outbox, one)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (defect := task.exception()) is not None:
            self._fail(defect)

    def _fail(self, defect: BaseException) -> None:
        """Ends this coordinator: the next one begins from what the registry and members know."""
        log.error("the coordinator cannot go on", exc_info=defect)
        if not self.ended.done():
            self.ended.set_exception(Internal(f"the coordinator cannot go on: {defect!r}"))

    def _registry_gone(self, error: AdashardError) -> None:
        self._carry_out(self._coordinator.registry_gone(error))

    def _registry_back(self) -> None:
        self._carry_out(self._coordinator.registry_back())

    async def _swap(self, swap: Swap) -> None:
        """Writes an entry, however long it takes to reach the registry.

        After a lost answer the write is repeated: it then fails, and the stored author says
        whether the first had arrived.
        """
        job = swap.entry.job
        failpoints.reach("swap.before")

        def write(registry: Registry) -> tuple[bool, Entry | None]:
            done = registry.swap(swap.entry, expected=swap.expected)
            return done, None if done else registry.read(job)

        done, stored = await self.registry.ask(write)
        failpoints.reach("swap.after")
        self._carry_out(self._coordinator.swapped(job, done, stored, self._clock()))

    async def _look_up(self) -> None:
        """Looks whether the registry holds what this coordinator has written."""
        for job in list(self._coordinator.jobs):
            stored = await self.registry.ask(methodcaller("read", job))
            self._carry_out(self._coordinator.looked_up(job, stored))

    async def _do_keep(self, keep: Keep) -> None:
        """Does something in the directory of checkpoints, which may fail: training goes on."""
        failure: AdashardError | None = None
        try:
            await asyncio.to_thread(self._keep, keep)
        except AdashardError as error:
            failure = error
            log.warning("%s", error.message)
        except Exception as defect:
            log.exception("the directory of checkpoints is left as it is")
            failure = Internal(f"{type(keep).__name__.lower()} failed: {defect!r}")
        if isinstance(keep, Commit):
            self._carry_out(self._coordinator.cuttings.stored(keep, failure))


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
