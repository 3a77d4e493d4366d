"""The shared directory of checkpoints, and a shard's part of one that is being cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.sim.clockwork import Process, Task
from tests.sim.history import Violation, Weights

from adashard.wire.control import SnapshotRequest, Snapshotted
from adashard.wire.errors import AdashardError, StaleGeneration
from adashard.wire.messages import Entry, Lineage, Record
from adashard_server.cluster.checkpoints import Checkpoint, Checkpoints, CheckpointSettings
from adashard_server.cluster.instructions import Commit, Discard, Keep, Remove

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.shard import SimShard

Slices = dict[int, Weights]


class Disk(Process):
    """What has been written stays, whoever dies. A checkpoint is there whole or not at all."""

    def __init__(self, cluster: Cluster, *, every_steps: int) -> None:
        super().__init__(cluster.loop, "disk")
        self._cluster = cluster
        self._settings = CheckpointSettings(every_steps=every_steps, keep_last=2, keep_best=0)
        self._attempts: dict[str, Slices] = {}
        self._complete: dict[str, tuple[Checkpoint, Slices]] = {}

    @property
    def count(self) -> int:
        """How many complete checkpoints there are."""
        return len(self._complete)

    def clear(self) -> None:
        """What is there belongs to a job that nobody knows any more."""
        self._complete.clear()

    def checkpoints(self) -> Checkpoints:
        """What a coordinator finds when it starts."""
        known = [checkpoint for checkpoint, _ in self._complete.values()]
        directory = "disk" if self._settings.every_steps else ""
        return Checkpoints(self._settings, known, directory=directory, mark="mark")

    def write(self, attempt: str, slices: Slices) -> None:
        """A shard's files."""
        self._attempts.setdefault(attempt, {}).update(slices)

    def restored(self, lineage: Lineage, index: int) -> Weights:
        """A slice of the checkpoint that a lineage goes on from."""
        _, slices = self._complete[lineage.checkpoint]
        values = [slices[piece.index].value for piece in self._cluster.truth.slices]
        return self._cluster.truth.begin(lineage, values)[index]

    def keep(self, caller: Process, keep: Keep, stored: Callable[[], object]) -> None:
        """Does what a coordinator asks for, and tells it of a commit."""

        def act() -> None:
            match keep:
                case Commit(checkpoint=checkpoint, attempt=attempt):
                    self._commit(checkpoint, self._attempts.pop(attempt, {}))
                    caller.after(self.loop.rng.uniform(0.0, 0.05), stored)
                case Discard(attempt=attempt):
                    self._attempts.pop(attempt, None)
                case Remove(name=name):
                    self._complete.pop(name, None)

        self.after(self.loop.rng.uniform(0.0, 0.05), act)

    def _commit(self, checkpoint: Checkpoint, slices: Slices) -> None:
        """A checkpoint has every slice, at one version of one line."""
        truth = self._cluster.truth
        lines = {weights.line for weights in slices.values()}
        if len(slices) != len(truth.slices) or len(lines) != 1:
            raise Violation(f"checkpoint {checkpoint.name} has {slices}")
        line = lines.pop()
        if (line.version, line.lineage) != (checkpoint.version, checkpoint.lineage.number):
            raise Violation(f"checkpoint {checkpoint.name} of {line}")
        for index, weights in slices.items():
            if truth.at(line, index) != weights:
                raise Violation(f"checkpoint {checkpoint.name} holds other bits of slice {index}")
        self._complete[checkpoint.name] = checkpoint, slices
        self._cluster.saw("a checkpoint is complete")


@dataclass
class Cut:
    """A shard's part of one checkpoint, from its request to its answer."""

    request: SnapshotRequest
    entry: Entry
    slices: tuple[int, ...]
    record: Record | None = None
    copies: Slices = field(default_factory=dict)
    void: bool = False
    answer: Snapshotted | None = None


class SimSnapshots:
    """Stands in for `Snapshots`: copies each slice between the step of its version and the next."""

    def __init__(self, shard: SimShard) -> None:
        self._shard = shard
        self._cut: Cut | None = None

    def void(self) -> None:
        """The generation ends, and what was cut in it with it (C10)."""
        if self._cut is not None:
            self._cut.void = True

    def committed(self, record: Record) -> None:
        """A step is decided."""
        if self._cut is not None and record.step == self._cut.request.version:
            self._cut.record = record

    def take(self, index: int) -> None:
        """Copies a slice, if a snapshot wants it as it is now and has no copy of it."""
        cut, held = self._cut, self._shard.slices.weights[index]
        if cut is None or cut.void or cut.request.version != held.version:
            return
        if index in cut.slices:
            cut.copies.setdefault(index, held)

    def run(self, request: SnapshotRequest) -> Task:
        """Cuts and writes a snapshot; answers when all is on the disk."""
        before = self._cut
        if before is not None and before.request == request and not before.void:
            if before.answer is not None:
                self._shard.tell(before.answer)
            return
        self.void()
        cut = self._begin(request)
        if cut is None:
            self._shard.tell(_failed(request, StaleGeneration("its generation is not open here")))
            return
        try:
            yield from self._write(cut)
        except AdashardError as error:
            cut.answer = _failed(request, error)
        assert cut.answer is not None
        self._shard.tell(cut.answer)

    def _begin(self, request: SnapshotRequest) -> Cut | None:
        rounds = self._shard.rounds
        if rounds.entry is None or rounds.promised != request.generation or not rounds.opened:
            return None
        self._cut = Cut(request, rounds.entry, rounds.mine)
        if rounds.record is not None:
            self.committed(rounds.record)
        return self._cut

    def _write(self, cut: Cut) -> Task:
        shard, request = self._shard, cut.request
        yield lambda: cut.void or shard.rounds.version >= request.version
        if cut.record is None and request.version > 0:
            raise StaleGeneration(f"step {request.version} is past already")
        for index in cut.slices:
            yield shard.loop.rng.choice([0.0, shard.cluster.apply_s])
            yield lambda index=index: cut.void or not shard.rounds.awaits(index)
            _check(cut)
            shard.settle(index)
            self.take(index)
            if index not in cut.copies:
                raise StaleGeneration(f"slice {index} is beyond step {request.version} already")
        shard.cluster.disk.write(request.directory, cut.copies)
        yield shard.loop.rng.uniform(0.0, 0.05)
        _check(cut)
        cut.answer = Snapshotted(
            job=request.job,
            generation=request.generation,
            version=request.version,
            slices=cut.slices,
            record=cut.record,
        )


def _check(cut: Cut) -> None:
    if cut.void:
        raise StaleGeneration(f"the snapshot of step {cut.request.version} is void")


def _failed(request: SnapshotRequest, error: AdashardError) -> Snapshotted:
    return Snapshotted(
        job=request.job,
        generation=request.generation,
        version=request.version,
        error=error.info(),
    )
