"""The coordinator's process: a real `Coordinator` and registry, fed from virtual streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from tests.sim.clockwork import END, Broken, Loop, Process, Stream, Task
from tests.sim.history import Violation

from adashard.wire.control import FromMember, Hello
from adashard.wire.errors import AdashardError
from adashard_server.cluster.coordinator import Coordinator, refusal
from adashard_server.cluster.instructions import (
    Announce,
    HangUp,
    Instruction,
    StepDown,
    Swap,
    Tell,
)
from adashard_server.cluster.leases import LeaseSettings
from adashard_server.cluster.registry import MemoryRegistry

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

TICK_S = 0.2
RETRY_S = 1.0


class SimCoordinator(Process):
    """Serves control streams and carries out what the coordinator decides."""

    def __init__(self, loop: Loop, cluster: Cluster) -> None:
        super().__init__(loop, "coordinator")
        self.cluster = cluster
        self.registry = MemoryRegistry()
        self.coordinator = Coordinator(
            self.name, [], leases=LeaseSettings(), min_shards=cluster.shard_count, token="", now=0.0
        )
        self._streams: dict[str, Stream] = {}
        self.start(self.every(TICK_S, self._tick))

    def connect(self, member: Process) -> Stream:
        stream = Stream(member, self)
        self.start(self._serve(stream))
        return stream

    def _tick(self) -> None:
        self._carry_out(self.coordinator.tick(self.loop.now))

    def _serve(self, stream: Stream) -> Task:
        try:
            hello = cast(Hello, (yield from stream.up.next()))
        except Broken:
            return
        try:
            instructions = self.coordinator.hello(hello, self.loop.now)
        except AdashardError as error:
            stream.down.send(refusal(hello, error))
            stream.down.send(END)
            return
        if hello.id in self._streams:
            self._streams[hello.id].down.send(END)
        self._streams[hello.id] = stream
        self._carry_out(instructions)
        try:
            while True:
                message = cast(FromMember, (yield from stream.up.next()))
                self._carry_out(self.coordinator.handle(hello.id, message, self.loop.now))
        except Broken:
            stream.cut()
        if self._streams.get(hello.id) is stream:
            del self._streams[hello.id]
            self._carry_out(self.coordinator.detached(hello.id, self.loop.now))

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Tell(member=member, message=message):
                    self.cluster.trace("tells %s %s", member, message)
                    self.cluster.check_told(member, message)
                    if member in self._streams:
                        self._streams[member].down.send(message)
                case HangUp(member=member):
                    if member in self._streams:
                        self._streams[member].down.send(END)
                case Swap():
                    self.start(self._swap(instruction))
                case Announce(name=name, text=text):
                    self.cluster.trace("EVENT %s", text)
                    if name == "lost":
                        raise Violation(f"a job was lost though no shard died: {text}")
                case StepDown(reason=reason):
                    raise Violation(f"the only coordinator steps down: {reason}")

    def _swap(self, swap: Swap) -> Task:
        """Writes; where the answer is lost it writes again, and reads who was there."""
        while True:
            yield self.loop.delay_s()
            done = self.registry.swap(swap.entry, expected=swap.expected)
            if done:
                self.cluster.check_entry(swap.entry)
            if not self.cluster.mishap(0.1):
                break
            yield RETRY_S
        job = swap.entry.job
        stored = None if done else self.registry.read(job)
        self._carry_out(self.coordinator.swapped(job, done, stored, self.loop.now))
