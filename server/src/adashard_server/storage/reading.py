"""Reads slices out of a checkpoint, whatever number of shards wrote it.

Slices are cut by shape alone, so those of another cluster are the same. Only what is asked for is
read, and each tensor is checked on the way: its name, shape and checksum. `check_files` reads all,
and says which file and which tensor are not what was written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from adashard.wire.control import SnapshotFile
from adashard.wire.messages import Content
from adashard.wire.placement import cut
from adashard_server.storage.disk import unreadable
from adashard_server.storage.manifest import Manifest, read_manifest
from adashard_server.storage.snapshot import checksum, tensor_name

Shapes = Mapping[Content, tuple[int, ...]]


def read_slices(
    folder: Path, wanted: Mapping[int, Shapes]
) -> Iterator[tuple[int, dict[Content, Tensor]]]:
    """Slices of a checkpoint with all that is wanted of each, flat float32 on the CPU.

    Args:
        folder: of the checkpoint.
        wanted: by slice, what it consists of, in which shapes.

    Raises:
        CheckpointUnreadable: a file or a tensor is missing, or not what was written.
    """
    manifest = read_manifest(folder)
    slices = cut(manifest.spec)
    with SnapshotFiles(folder, manifest) as files:
        for index, shapes in wanted.items():
            if not 0 <= index < len(slices):
                raise unreadable(folder, f"has no slice {index}; the job has {len(slices)}")
            piece, shard = slices[index], manifest.placement[index]
            yield (
                index,
                {
                    content: files.tensor(
                        shard, tensor_name(manifest.spec, piece, content), shape
                    ).view(-1)
                    for content, shape in shapes.items()
                },
            )


def check_files(folder: Path, manifest: Manifest) -> None:
    """Reads every byte of a checkpoint.

    Raises:
        CheckpointUnreadable: the first file that is missing or not what was written, with the
            tensor where it is one.
    """
    for file in manifest.files:
        path = folder / file.name
        with _reading(path), path.open("rb") as stored:
            sha256 = hashlib.file_digest(stored, "sha256").hexdigest()
        if sha256 == file.sha256:
            continue
        with _File(folder, file) as tensors:
            for name in tensors.names:
                tensors.read(name)
        raise unreadable(path, f"is damaged: its SHA-256 is {sha256}, not {file.sha256}")


class SnapshotFiles:
    """The files of a checkpoint, opened when they are first needed. A context manager.

    Args:
        folder: of the checkpoint.
        manifest: its manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._opened: dict[int, dict[str, _File]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> SnapshotFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tensor(self, shard: int, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor of a shard's files; a copy.

        Raises:
            CheckpointUnreadable: it is not there, of another shape, or damaged.
        """
        file = self._files(shard).get(name)
        if file is None:
            where = f"of shard {shard} do not hold tensor {name!r}"
            raise unreadable(self._folder, f"is not whole: the files {where}", tensor=name)
        tensor = file.read(name)
        if tuple(tensor.shape) != shape:
            what = f"holds tensor {name!r} as {tuple(tensor.shape)}, and not as {shape}"
            raise unreadable(file.path, what, tensor=name)
        return tensor.clone()

    def _files(self, shard: int) -> dict[str, _File]:
        """By tensor, the file of the shard that it is in."""
        if shard not in self._opened:
            found = self._opened[shard] = {}
            for file in self._manifest.files:
                if file.name.startswith(f"shard-{shard}-"):
                    opened = self._stack.enter_context(_File(self._folder, file))
                    found.update(dict.fromkeys(opened.names, opened))
        return self._opened[shard]


class _File:
    """One open file; its tensors are views of it. A context manager."""

    def __init__(self, folder: Path, file: SnapshotFile) -> None:
        self.path = folder / file.name
        self._byte_count = file.byte_count
        self._stack = ExitStack()
        self._file: Any = None
        self.names: list[str] = []
        self._checksums: dict[str, str] = {}

    def __enter__(self) -> _File:
        with _reading(self.path):
            size = self.path.stat().st_size
            if size != self._byte_count:
                what = f"has {size} bytes, and {self._byte_count} were written"
                raise unreadable(self.path, what)
            self._file = self._stack.enter_context(safe_open(self.path, "pt"))
            self.names = self._file.keys()
            self._checksums = self._file.metadata() or {}
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        with _reading(self.path, tensor=name):
            tensor: Tensor = self._file.get_tensor(name)
        if checksum(tensor) != self._checksums.get(name):
            raise unreadable(self.path, f"is damaged in tensor {name!r}", tensor=name)
        return tensor


@contextmanager
def _reading(path: Path, tensor: str = "") -> Iterator[None]:
    """Tells of a file that cannot be read in words of the catalogue."""
    try:
        yield
    except FileNotFoundError:
        raise unreadable(path, "is missing", tensor=tensor) from None
    except OSError as error:
        raise unreadable(path, f"cannot be read: {error.strerror}", tensor=tensor) from None
    except SafetensorError as error:
        raise unreadable(path, f"is damaged: {error}", tensor=tensor) from None
