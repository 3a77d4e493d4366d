"""What workers and shards share: a control stream that is opened anew when it breaks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, cast

from tests.sim.clockwork import END, Broken, Loop, Process, Stream, Task

from adashard.wire.control import FromCoordinator, FromMember, Hello, Renewal

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

RENEW_S = 1.0


class Member(Process, ABC):
    """A process that attends a job."""

    def __init__(self, loop: Loop, name: str, cluster: Cluster) -> None:
        super().__init__(loop, name)
        self.cluster = cluster
        self.control: Stream | None = None
        self.start(self._attend())
        self.start(self.every(RENEW_S, self.renew))

    @abstractmethod
    def hello(self) -> Hello: ...

    @abstractmethod
    def renewal(self) -> Renewal: ...

    @abstractmethod
    def handle(self, message: FromCoordinator) -> None: ...

    def tell(self, message: FromMember) -> None:
        if self.control is not None:
            self.cluster.trace("%s says %s", self.name, message)
            self.control.up.send(message)

    def renew(self) -> None:
        self.tell(self.renewal())

    def kill(self) -> None:
        super().kill()
        if self.control is not None:
            self.control.cut()

    def _attend(self) -> Task:
        while True:
            stream = self.control = self.cluster.coordinator.connect(self)
            stream.up.send(self.hello())
            self.renew()
            try:
                while (message := (yield from stream.down.next())) != END:
                    self.handle(cast(FromCoordinator, message))
            except Broken:
                pass
            stream.cut()
            yield self.loop.rng.uniform(0.05, 0.5)
