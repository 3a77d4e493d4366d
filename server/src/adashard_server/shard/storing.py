"""What a shard asks of the disk; who puts a shard together gives it one that is real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from adashard.wire.control import SnapshotFile
from adashard.wire.errors import CheckpointUnreadable, CheckpointUnwritable
from adashard.wire.messages import Content, Plan
from adashard.wire.placement import Slice
from adashard.wire.spec import JobSpec
from adashard_server.shard.rounds import Rounds

Shapes = Mapping[Content, tuple[int, ...]]
Contents = Mapping[Content, Tensor]


class Storage(Protocol):
    """A directory of checkpoints. Calls take as long as the disk does; no lock may be held."""

    def read(
        self, job: str, checkpoint: str, wanted: Mapping[int, Shapes]
    ) -> Iterator[tuple[int, dict[Content, Tensor]]]:
        """Slices of a checkpoint, flat float32 on the CPU, each checked; owned by the caller.

        Args:
            job: whose.
            checkpoint: its name.
            wanted: by slice, what it consists of.

        Raises:
            CheckpointUnreadable: something is missing or not what was written.
        """

    def write(
        self,
        job: str,
        attempt: str,
        shard: int,
        spec: JobSpec,
        slices: Sequence[Slice],
        held: Mapping[int, Contents],
    ) -> tuple[tuple[SnapshotFile, ...], tuple[int, ...]]:
        """Writes and syncs a shard's slices; the files, and the slices that are not finite.

        Args:
            job: whose.
            attempt: for which attempt at a checkpoint.
            shard: the shard's number in the generation.
            spec: the job.
            slices: all of the job.
            held: those of the shard, in the shapes of their parts.

        Raises:
            CheckpointUnwritable: no room, or no permission.
        """

    def discard(self, job: str, attempt: str) -> None:
        """Removes what was written for an attempt; does not fail."""


class NoStorage:
    """The storage of a shard in a cluster without a directory of checkpoints."""

    def read(
        self, job: str, checkpoint: str, wanted: Mapping[int, Shapes]
    ) -> Iterator[tuple[int, dict[Content, Tensor]]]:
        """Refuses: there is none."""
        raise CheckpointUnreadable(f"there is no directory with checkpoint {checkpoint} here")

    def write(
        self,
        job: str,
        attempt: str,
        shard: int,
        spec: JobSpec,
        slices: Sequence[Slice],
        held: Mapping[int, Contents],
    ) -> tuple[tuple[SnapshotFile, ...], tuple[int, ...]]:
        """Refuses: there is none."""
        raise CheckpointUnwritable("there is no directory for checkpoints here")

    def discard(self, job: str, attempt: str) -> None:
        """Nothing has been written."""


def from_checkpoint(
    plan: Plan, rounds: Rounds, shapes: Callable[[int], Shapes]
) -> dict[int, Shapes]:
    """What a plan has this shard read from the lineage's checkpoint, and is not here yet."""
    return {
        source.slice: shapes(source.slice)
        for source in plan.sources
        if not source.member
        and source.slice in rounds.mine
        and rounds.lacks(source.slice, source.version)
    }


def stored_slices(
    storage: Storage, plan: Plan, wanted: Mapping[int, Shapes], device: torch.device
) -> Iterator[tuple[int, int, dict[Content, Tensor]]]:
    """Reads these slices from the checkpoint of the plan's lineage, onto a device.

    With each comes its version, that of the checkpoint: the plan's base, or the one before.

    Raises:
        CheckpointUnreadable: something is missing or not what was written.
    """
    lineage = plan.entry.lineage
    if not wanted or lineage is None:
        return
    for index, contents in storage.read(plan.entry.job, lineage.checkpoint, wanted):
        ours = {content: one.to(device) for content, one in contents.items()}
        yield index, lineage.base_version, ours
