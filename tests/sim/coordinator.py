"""A coordinator's process: a real `Coordinator`, fed from virtual streams; and the registry's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from tests.sim.clockwork import Process, Task
from tests.sim.network import END, Broken, Stream
from tests.sim.windows import windows_of

from adashard.wire.control import FromMember, Frozen, Hello, PlanRequest, Renewal
from adashard.wire.errors import AdashardError
from adashard.wire.messages import Entry, Plan
from adashard_server.cluster.coordinator import Coordinator, refusal
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
from adashard_server.cluster.registry import ABSENT, MemoryRegistry

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

TICK_S = 0.2
RETRY_S = 1.0

Answer = tuple[bool, Entry | None]


class SimRegistry(Process):
    """Redis: durable, and at times out of reach."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster.loop, "registry")
        self._cluster = cluster
        self._entries = MemoryRegistry()
        self.newest: Entry | None = None  # that was ever written, as the world knows

    @property
    def entry(self) -> Entry | None:
        return self._entries.read(self._cluster.job)

    def reaches(self, caller: Process) -> bool:
        return self._cluster.network.parted_until(caller, self) <= self.loop.now

    def forget(self) -> None:
        """It was in a coordinator's memory, and that has died."""
        self._entries = MemoryRegistry()

    def swap(self, caller: Process, swap: Swap, answered: Callable[[Answer | None], None]) -> None:
        """Compares and sets; None is answered where the call or its answer was lost."""
        network = self._cluster.network

        def write() -> None:
            if not (caller.alive or self._cluster.durable):
                return
            done = self._entries.swap(swap.entry, expected=swap.expected)
            if done:
                if self.newest is not None and swap.expected == ABSENT:
                    self._cluster.begins_anew(swap.entry)
                self.newest = swap.entry
                self._cluster.promises.wrote(swap.entry)
                self._cluster.changed = True
            answer = None if network.mishap(0.1) else (done, None if done else self.entry)
            caller.after(network.delay_s(), lambda: answered(answer))

        if not self.reaches(caller) or network.mishap(0.05):
            caller.after(RETRY_S, lambda: answered(None))
        else:
            self.after(network.delay_s(), write)


class SimCoordinator(Process):
    """Serves control streams and carries out what the coordinator decides."""

    def __init__(self, name: str, cluster: Cluster, registry: SimRegistry) -> None:
        super().__init__(cluster.loop, name)
        self.cluster = cluster
        self.registry = registry
        entry = registry.entry
        self.coordinator = Coordinator(
            name,
            [entry] if entry else [],
            leases=cluster.leases,
            min_shards=cluster.shard_count,
            token="",
            alone=not cluster.durable,
            checkpoints=cluster.disk.checkpoints(),
            now=self.loop.now,
        )
        self._streams: dict[str, Stream] = {}
        self._answers: dict[str, Frozen] = {}
        self._planned: Plan | None = None
        self.start(self.every(TICK_S, self._tick))
        self.start(self._look_up())

    def serve(self, stream: Stream) -> Task:
        """One member's control stream, from its hello on."""
        try:
            hello = cast(Hello, (yield from stream.up.next()))
        except Broken:
            return
        try:
            instructions = self.coordinator.hello(hello, self.loop.now)
        except AdashardError as error:
            self.cluster.trace("%s refuses %s: %s", self.name, hello.id, error)
            stream.down.send(refusal(hello, error))
            stream.down.send(END)
            return
        if hello.id in self._streams:
            self._streams[hello.id].down.send(END)
        self._streams[hello.id] = stream
        self._carry_out(instructions)
        try:
            while self._streams.get(hello.id) is stream:
                message = cast(FromMember, (yield from stream.up.next()))
                if self._streams.get(hello.id) is stream:  # no newer one has come meanwhile
                    self._handle(hello.id, message)
        except AdashardError as error:  # nothing that it says makes sense any more
            stream.down.send(refusal(hello, error))
            stream.down.send(END)
        except Broken:
            stream.cut()
        if self._streams.get(hello.id) is stream:
            del self._streams[hello.id]
            self._carry_out(self.coordinator.detached(hello.id, self.loop.now))

    def kill(self) -> None:
        super().kill()
        self.cluster.network.drop(self)
        if not self.cluster.durable:
            self.registry.forget()

    def _tick(self) -> None:
        self._carry_out(self.coordinator.tick(self.loop.now))

    def _handle(self, member: str, message: FromMember) -> None:
        now = self.loop.now
        if isinstance(message, Frozen):
            self._answers[member] = message
        silent = isinstance(message, Renewal) and member in self.coordinator.leases.dead(now)
        if silent and self.cluster.is_member(member):
            self.cluster.saw("a member is revived")
        self._carry_out(self.coordinator.handle(member, message, now))

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Tell(member=member, message=message):
                    self._tell(member, message)
                case HangUp(member=member):
                    if member in self._streams:
                        self._streams[member].down.send(END)
                case Swap():
                    self._watch(instruction)
                    self.start(self._swap(instruction))
                case Commit() | Discard() | Remove():
                    self._keep(instruction)
                case Announce(name=name, text=text):
                    self.cluster.announced(self, name, text)
                case StepDown(reason=reason):
                    self.cluster.steps_down(self, reason)

    def _keep(self, keep: Keep) -> None:
        def stored() -> None:
            assert isinstance(keep, Commit)
            self._carry_out(self.coordinator.cuttings.stored(keep, None))

        self.cluster.disk.keep(self, keep, stored)

    def _look_up(self) -> Task:
        """Looks now and then whether the registry holds what this coordinator has written."""
        while True:
            yield self.cluster.leases.lease_s / 3
            if self.registry.reaches(self):
                yield self.cluster.network.delay_s()
                stored = self.registry.entry
                self._carry_out(self.coordinator.looked_up(self.cluster.job, stored))

    def _tell(self, member: str, message: object) -> None:
        self.cluster.trace("%s tells %s %s", self.name, member, message)
        if self.cluster.job in self.coordinator.jobs:
            entry = self.coordinator.jobs[self.cluster.job].entry
            self.cluster.promises.told(entry, member, message)
        if isinstance(message, PlanRequest) and message.plan is not self._planned:
            self._planned = message.plan
            generation = message.plan.entry.generation
            answers = {m: a for m, a in self._answers.items() if a.generation == generation}
            for window in windows_of(message.plan, answers):
                self.cluster.saw(window)
            self.cluster.reached("plan", self)
        if member in self._streams:
            self._streams[member].down.send(message)

    def _watch(self, swap: Swap) -> None:
        """Counts generations that are made while the one before was not yet open."""
        stored = self.registry.entry
        if stored and swap.entry.generation > stored.generation and self._answers:
            planned = self._planned.entry.generation if self._planned else 0
            if planned < stored.generation:
                self.cluster.saw("a generation is made while the one before freezes")
            elif not self.cluster.opened(stored.generation):
                self.cluster.saw("a generation is made while the one before is repaired")

    def _swap(self, swap: Swap) -> Task:
        """Writes; where the answer is lost it writes again, and reads who was there."""
        answers: list[Answer | None] = []
        while True:
            self.registry.swap(self, swap, answers.append)
            yield lambda: bool(answers)
            answer = answers.pop()
            if answer is not None:
                break
            yield RETRY_S
        done, stored = answer
        self._carry_out(self.coordinator.swapped(swap.entry.job, done, stored, self.loop.now))
        self.cluster.reached("swap", self)
