"""A worker's uploads, for one plan at a time (docs/protocol.md, rule W3)."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from tests.sim.clockwork import Task
from tests.sim.history import Weights
from tests.sim.network import END, Broken, Stream

from adashard.wire.messages import Entry, Plan, UploadBegin

if TYPE_CHECKING:
    from tests.sim.worker import SimWorker


class Uploads:
    """Sends what plans want of a worker, as long as it has it."""

    def __init__(self, worker: SimWorker) -> None:
        self._worker = worker
        self._generation = 0
        self._arrived: set[int] = set()  # slices, in this generation
        self._busy = False

    def supply(self, plan: Plan) -> None:
        """Sends what the plan wants, unless that is under way or has arrived."""
        self.say_what_is_missing(plan)
        if plan.entry.generation != self._generation:
            self._generation, self._arrived, self._busy = plan.entry.generation, set(), False
        wanted = self._worker.worker.supplies(plan)
        left = {index: wanted[index] for index in wanted if index not in self._arrived}
        if left and not self._busy:
            self._busy = True
            self._worker.start(self._upload_all(plan, left))

    def say_what_is_missing(self, plan: Plan) -> None:
        """Answers the freeze once more where the plan counts on a copy that is none."""
        worker = self._worker
        if worker.worker.misses(plan):
            worker.cluster.saw("a plan counts on a copy that is none")
            worker.tell(worker.worker.freeze(plan.entry))

    def intact(self, index: int) -> bool:
        """Whether the weights have still the checksum that they came with."""
        return index not in self._worker.swapped

    def _upload_all(self, plan: Plan, wanted: dict[int, int]) -> Task:
        worker, generation, arrived = self._worker, self._generation, self._arrived
        for index in wanted:
            if not self.intact(index):
                worker.worker.changed(index)
                worker.cluster.changed = True
        self.say_what_is_missing(plan)
        left = {index: version for index, version in wanted.items() if self.intact(index)}
        for shard, indices in by_shard(plan.entry).items():
            for version in sorted({left[index] for index in indices if index in left}):
                slices = [index for index in indices if left.get(index) == version]
                begin = UploadBegin(
                    job=worker.cluster.job,
                    generation=generation,
                    sender=worker.name,
                    receiver=shard,
                    version=version,
                    state=True,
                )
                yield from self._upload(begin, slices, arrived)
        if self._generation == generation:
            self._busy = False

    def _upload(self, begin: UploadBegin, slices: list[int], arrived: set[int]) -> Task:
        worker, cluster = self._worker, self._worker.cluster
        shard = cluster.shards[begin.receiver]
        stream = Stream(cluster.network, worker, shard)
        shard.start(shard.upload(stream))
        stream.up.send(begin)
        worker.links.asked(shard.name, (begin.generation, "upload"))
        cluster.reached("upload", worker)
        for index in slices:
            checksum = worker.values[index]
            for run in cluster.runs(index):
                stream.up.send((run, self._content(index), checksum))
                yield worker.loop.rng.uniform(0.0, 0.01)
        stream.up.send(END)
        with contextlib.suppress(Broken):
            if (yield from stream.down.next()) == END:
                arrived.update(slices)
            worker.links.answered(shard.name)
        worker.links.dropped(shard.name)
        stream.close()

    def _content(self, index: int) -> Weights | None:
        """What is read from the parameters, whoever has written them."""
        held = self._worker.values[index]
        if held is not None and index in self._worker.swapped:
            return held._replace(value=~held.value)
        return held


def by_shard(entry: Entry) -> dict[str, list[int]]:
    """The slices of each shard that has any."""
    found: dict[str, list[int]] = {}
    for index, owner in enumerate(entry.placement):
        found.setdefault(entry.shards[owner].id, []).append(index)
    return found
