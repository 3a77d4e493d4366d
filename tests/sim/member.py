"""What workers and shards share: a control stream that is opened anew when it breaks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, cast

from tests.sim.clockwork import Process, Task
from tests.sim.network import END, Broken, Stream

from adashard.transport.links import Links
from adashard.wire.control import FromCoordinator, FromMember, Hello, Renewal
from adashard.wire.messages import Entry

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.history import Weights

RENEW_S = 0.5


class Member(Process, ABC):
    """A process that attends a job."""

    entry: Entry | None
    """The newest that it knows."""

    def __init__(self, name: str, cluster: Cluster) -> None:
        super().__init__(cluster.loop, name)
        self.cluster = cluster
        self.control: Stream | None = None
        self.entry = None
        self.links = Links(lambda: self.loop.now)
        self.links.lease_s = cluster.leases.lease_s
        self.start(self._attend())
        self.start(self.every(RENEW_S, self.renew))

    @abstractmethod
    def hello(self) -> Hello: ...

    @abstractmethod
    def renewal(self) -> Renewal: ...

    @abstractmethod
    def handle(self, message: FromCoordinator) -> None: ...

    @abstractmethod
    def copies(self) -> dict[int, Weights]:
        """What it holds, by slice."""

    def tell(self, message: FromMember) -> None:
        if self.control is not None:
            if not isinstance(message, Renewal):
                self.cluster.trace("%s says %s", self.name, message)
            self.control.up.send(message)

    def renew(self) -> None:
        self.tell(self.renewal())

    def entries(self) -> tuple[Entry, ...]:
        """For a coordinator that has lost its registry."""
        return (self.entry,) if self.entry is not None else ()

    def kill(self) -> None:
        super().kill()
        self.cluster.network.drop(self)
        self.cluster.changed = True

    def _attend(self) -> Task:
        while True:
            server = self.cluster.front()
            if server is not None:
                yield from self._stream(Stream(self.cluster.network, self, server))
            yield self.loop.rng.uniform(0.05, 0.5)

    def _stream(self, stream: Stream) -> Task:
        """One control stream, from hello to its end."""
        self.control = stream
        self.cluster.serve(stream)
        stream.up.send(self.hello())
        self.renew()
        try:
            while (message := (yield from stream.down.next())) != END:
                self.handle(cast(FromCoordinator, message))
        except Broken:
            pass
        stream.cut()
