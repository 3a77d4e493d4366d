"""A job's slices on this shard as they are at one version, cut while its steps go on (rule S9).

A slice is copied when it has taken the step of the snapshot's version and before it takes the
next: by the snapshot's own thread, or by whichever thread is about to take that next step. So no
step waits for more than the copy of the slice that it needs. What is then written to disk are the
copies, and nobody waits for that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from adashard.wire.control import SnapshotRequest, Snapshotted
from adashard.wire.errors import AdashardError, StaleGeneration
from adashard.wire.messages import Content, Entry, Record
from adashard_server.shard.rounds import Rounds
from adashard_server.shard.slices import SliceStore
from adashard_server.shard.storing import Storage


@dataclass(slots=True)
class _Cut:
    """One snapshot from its request to its answer.

    Attributes:
        request: what was asked for.
        entry: the generation in which it is cut.
        slices: those that belong to it, ascending.
        record: of its version, once that is decided.
        copies: of the slices that have been copied, in the shapes of their parts.
        stall_s: seconds spent on copying: no step has waited for longer.
        void: whether the generation has ended, or another snapshot was asked for.
        answer: what came of it.
    """

    request: SnapshotRequest
    entry: Entry
    slices: tuple[int, ...]
    record: Record | None = None
    copies: dict[int, dict[Content, Tensor]] = field(default_factory=dict)
    stall_s: float = 0.0
    void: bool = False
    answer: Snapshotted | None = None

    def see(self, record: Record | None) -> None:
        """A record is known: that of the version, or another."""
        if record is not None and record.step == self.request.version:
            self.record = record


class Snapshots:
    """The snapshot of a job that is under way on a shard, if one is.

    Args:
        rounds: of the job; read under `turn`.
        storage: where snapshots are written to.
        turn: the engine's lock, notified at every change.
        clock: seconds, monotonic.
        copy: brings a slice to the newest decided step and has it copied by `take`, given a way
            to ask whether that is still wanted.
    """

    def __init__(
        self,
        rounds: Rounds,
        storage: Storage,
        turn: threading.Condition,
        clock: Callable[[], float],
        copy: Callable[[int, Callable[[], bool]], None],
    ) -> None:
        self._rounds, self._storage = rounds, storage
        self._turn, self._clock, self._copy = turn, clock, copy
        self._cut: _Cut | None = None

    # --- the engine's calls ---------------------------------------------------------------------

    def void(self) -> None:
        """The generation ends, and what was cut in it with it (C10). The lock must be held."""
        if self._cut is not None:
            self._cut.void = True

    def end(self) -> None:
        """The job is not here any more: what is still waited for is void."""
        with self._turn:
            self.void()
            self._turn.notify_all()

    def committed(self, record: Record) -> None:
        """A step is decided. The lock must be held."""
        if self._cut is not None:
            self._cut.see(record)

    def take(self, index: int, version: int, store: SliceStore) -> None:
        """Copies a slice, if a snapshot wants it as it is now and has no copy of it.

        Nobody else may work on the slice meanwhile; the lock must not be held.

        Args:
            index: the slice.
            version: the steps that it has taken.
            store: holds it.
        """
        cut = self._cut
        wanted = cut is not None and cut.request.version == version and not cut.void
        if cut is None or not wanted or index not in cut.slices or index in cut.copies:
            return
        began = self._clock()
        copy = {
            content: store.tensor(index, content).view(shape).to("cpu", copy=True)
            for content, shape in store.shapes(index).items()
        }
        with self._turn:
            cut.copies[index] = copy
            cut.stall_s += self._clock() - began

    def run(self, request: SnapshotRequest) -> Snapshotted | None:
        """Cuts and writes a snapshot; blocks until the version is reached and all is on disk.

        Args:
            request: what is wanted; takes the place of an earlier one.

        Returns:
            The answer to the request; None while an earlier call is at the same one.
        """
        with self._turn:
            before = self._cut
            if before is not None and before.request == request and not before.void:
                return before.answer
            self.void()
            self._turn.notify_all()
            cut = self._begin(request)
        if before is not None:
            # It has been committed, under another name, or has come to nothing.
            self._storage.discard(before.request.job, before.request.directory)
        if cut is None:
            return _failed(request, StaleGeneration("the generation of it is not open here"))
        try:
            answer = self._write(cut)
        except AdashardError as error:
            self._storage.discard(request.job, request.directory)
            answer = _failed(request, error)
        cut.copies.clear()
        cut.answer = answer
        return answer

    # --- inside ---------------------------------------------------------------------------------

    def _begin(self, request: SnapshotRequest) -> _Cut | None:
        entry = self._rounds.entry
        if entry is None or entry.generation != request.generation or not self._rounds.opened:
            return None
        self._cut = _Cut(request, entry, self._rounds.mine)
        self._cut.see(self._rounds.record)
        return self._cut

    def _write(self, cut: _Cut) -> Snapshotted:
        request = cut.request
        with self._turn:
            self._turn.wait_for(lambda: cut.void or self._rounds.version >= request.version)
            cut.see(self._rounds.record)  # a step may wake it before it is told of the step
            if cut.record is None and request.version > 0:
                raise StaleGeneration(f"step {request.version} is past already")
        for index in cut.slices:
            self._check(cut)
            self._copy(index, lambda: not cut.void)
            if index not in cut.copies:
                raise StaleGeneration(f"slice {index} is beyond step {request.version} already")
        self._check(cut)
        shard = [member.id for member in cut.entry.shards].index(self._rounds.shard)
        files, not_finite = self._storage.write(
            request.job,
            request.directory,
            shard,
            cut.entry.spec,
            self._rounds.slices,
            cut.copies,
        )
        self._check(cut)
        return Snapshotted(
            job=request.job,
            generation=request.generation,
            version=request.version,
            files=files,
            stall_s=cut.stall_s,
            slices=cut.slices,
            record=cut.record,
            not_finite=not_finite,
        )

    def _check(self, cut: _Cut) -> None:
        """Refuses to go on with what is void.

        Raises:
            StaleGeneration: the generation has ended, or another snapshot was asked for.
        """
        if cut.void:
            raise StaleGeneration(f"the snapshot of step {cut.request.version} is void")


def _failed(request: SnapshotRequest, error: AdashardError) -> Snapshotted:
    return Snapshotted(
        job=request.job,
        generation=request.generation,
        version=request.version,
        error=error.info(),
    )
