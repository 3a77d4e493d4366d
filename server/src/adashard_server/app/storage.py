"""A shard's view of the directory of checkpoints, once the coordinator has said where it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from adashard.wire.control import SnapshotFile
from adashard.wire.errors import CheckpointUnreadable
from adashard.wire.messages import Content
from adashard.wire.placement import Slice
from adashard.wire.spec import JobSpec
from adashard_server.shard.storing import Contents, Shapes
from adashard_server.storage import checkpoints
from adashard_server.storage.reading import read_slices
from adashard_server.storage.snapshot import write_snapshot


class SharedStorage:
    """A `Storage` on a file system that all shards and the coordinator share. Thread-safe.

    Args:
        directory: where this process has it; empty for where the coordinator says.
    """

    def __init__(self, directory: str = "") -> None:
        self._own = directory
        self._directory: Path | None = None

    def use(self, directory: str, mark: str) -> None:
        """Takes the directory that the coordinator has told of; an empty one for none.

        Raises:
            CheckpointUnreadable: this process does not see it.
            CheckpointUnwritable: it may not write there.
        """
        self._directory = None
        if directory:
            here = Path(self._own or directory)
            checkpoints.check_seen(here, mark)
            self._directory = here

    def read(
        self, job: str, checkpoint: str, wanted: Mapping[int, Shapes]
    ) -> Iterator[tuple[int, dict[Content, Tensor]]]:
        """See `Storage.read`."""
        return read_slices(checkpoints.checkpoint_folder(self._here(), job, checkpoint), wanted)

    def write(
        self,
        job: str,
        attempt: str,
        shard: int,
        spec: JobSpec,
        slices: Sequence[Slice],
        held: Mapping[int, Contents],
    ) -> tuple[tuple[SnapshotFile, ...], tuple[int, ...]]:
        """See `Storage.write`."""
        folder = checkpoints.partial_folder(self._here(), job, attempt)
        return write_snapshot(folder, shard, spec, slices, held)

    def discard(self, job: str, attempt: str) -> None:
        """See `Storage.discard`."""
        if self._directory is not None:
            checkpoints.discard(self._directory, job, attempt)

    def _here(self) -> Path:
        if self._directory is None:
            raise CheckpointUnreadable("this shard has no directory of checkpoints")
        return self._directory
