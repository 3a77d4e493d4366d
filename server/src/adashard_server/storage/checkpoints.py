"""The directory that all checkpoints of a cluster are in, on a file system that all of it shares.

    <directory>/<job>/step-120/manifest.json, shard-0-weights.safetensors, ...
    <directory>/<job>/step-180.1f0c-3.partial/    being written, or left by a death

A checkpoint comes to be by one rename, of a folder whose files and manifest are on disk already,
and goes by one: what bears the name of a checkpoint is whole, whoever dies when.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from adashard.wire.errors import CheckpointUnreadable, CheckpointUnwritable
from adashard_server.storage.disk import sync, unreadable, unwritable
from adashard_server.storage.manifest import NAME, Manifest, read_manifest, to_json

PARTIAL = ".partial"
CHECKPOINTS_MAX = 10_000  # of a job
_MARK = ".cluster-"
_FOLDER_NAME_MAX = 200
_ATTEMPT = re.compile(r"step-[0-9]{1,19}(\.[0-9]{1,19})?\.[0-9a-z]{1,64}-[0-9]{1,19}")
_CHECKPOINT = re.compile(r"step-[0-9]{1,19}(\.[0-9]{1,19})?")
_MARKED = re.compile(rf"{re.escape(_MARK)}[0-9a-f]{{32}}")


@dataclass(frozen=True, slots=True)
class Damaged:
    """A folder that bears the name of a checkpoint and is none.

    Attributes:
        path: the folder.
        error: what is wrong with it.
    """

    path: Path
    error: CheckpointUnreadable


def folder_name(job: str) -> str:
    """How a job's folder is called: its name, where that fits, and never two jobs' the same."""
    name = quote(job, safe="").replace("~", "%7E")
    if name.startswith("."):
        name = f"%2E{name[1:]}"
    if len(name) <= _FOLDER_NAME_MAX:
        return name
    return f"{name[:100]}~{hashlib.sha256(job.encode()).hexdigest()[:32]}"


def checkpoint_folder(directory: Path, job: str, name: str) -> Path:
    """Where a checkpoint is.

    Raises:
        CheckpointUnreadable: no checkpoint can have this name.
    """
    if not _CHECKPOINT.fullmatch(name):
        raise unreadable(directory / folder_name(job), f"has no checkpoint {name!r}")
    return directory / folder_name(job) / name


def partial_folder(directory: Path, job: str, attempt: str) -> Path:
    """Where the shards write their files for one attempt at a checkpoint.

    Raises:
        CheckpointUnwritable: no attempt can have this name.
    """
    if not _ATTEMPT.fullmatch(attempt):
        raise CheckpointUnwritable(f"{attempt!r} is no name of an attempt at a checkpoint")
    return directory / folder_name(job) / f"{attempt}{PARTIAL}"


def discard(directory: Path, job: str, attempt: str) -> None:
    """Removes what was written for an attempt that has come to nothing."""
    shutil.rmtree(partial_folder(directory, job, attempt), ignore_errors=True)


# --- reading -------------------------------------------------------------------------------------


def checkpoints(directory: Path, job: str | None = None) -> list[Manifest | Damaged]:
    """What is in a directory, of one job or of all, as lineages and versions follow each other.

    Raises:
        CheckpointUnreadable: the directory cannot be read, or holds too many.
    """
    found = [_manifest(folder) for folder in _folders(directory, job)]
    return sorted(found, key=_order)


def _order(one: Manifest | Damaged) -> tuple[str, int, int]:
    if isinstance(one, Damaged):
        return (one.path.parent.name, -1, 0)
    return (folder_name(one.job), one.lineage.number, one.version)


def _manifest(folder: Path) -> Manifest | Damaged:
    try:
        manifest = read_manifest(folder)
        if folder != checkpoint_folder(folder.parents[1], manifest.job, manifest.name):
            what = f"is checkpoint {manifest.name} of job {manifest.job!r}, and not in its place"
            return Damaged(folder, unreadable(folder, what))
        return manifest
    except CheckpointUnreadable as error:
        return Damaged(folder, error)


def _folders(directory: Path, job: str | None) -> Iterator[Path]:
    """Every folder that is called as a checkpoint is."""
    try:
        jobs = [directory / folder_name(job)] if job is not None else list(directory.iterdir())
        for room in jobs:
            if not room.is_dir():
                continue
            names = [one for one in room.iterdir() if _CHECKPOINT.fullmatch(one.name)]
            if len(names) > CHECKPOINTS_MAX:
                raise unreadable(room, f"holds {len(names)} checkpoints, beyond {CHECKPOINTS_MAX}")
            yield from names
    except OSError as error:
        raise unreadable(directory, f"cannot be read: {error.strerror}") from None


# --- writing -------------------------------------------------------------------------------------


class CheckpointDirectory:
    """A coordinator's hold on the directory. Calls take as long as the disk does.

    Args:
        path: made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.mark = f"{_MARK}{uuid.uuid4().hex}"

    def claim(self) -> None:
        """Puts a mark into the directory for shards to see, and clears what deaths have left.

        Raises:
            CheckpointUnwritable: it cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for old in self.path.glob(f"{_MARK}*"):
                old.unlink(missing_ok=True)
            (self.path / self.mark).touch()
            for left in self.path.glob(f"*/*{PARTIAL}"):
                shutil.rmtree(left)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def release(self) -> None:
        """Takes the mark away; a cluster that begins later puts its own."""
        (self.path / self.mark).unlink(missing_ok=True)

    def commit(self, manifest: Manifest, attempt: str) -> None:
        """Makes a checkpoint of what shards have written for an attempt at it.

        Args:
            manifest: names all their files; written beside them before the folder gets its name.
            attempt: as the shards were told.

        Raises:
            CheckpointUnwritable: the disk refuses; the folder is left as it is.
            CheckpointUnreadable: a file is not there in its size: a shard wrote it elsewhere.
        """
        folder = partial_folder(self.path, manifest.job, attempt)
        self._check_sizes(folder, manifest)
        target = checkpoint_folder(self.path, manifest.job, manifest.name)
        try:
            (folder / NAME).write_text(to_json(manifest))
            sync(folder / NAME)
            sync(folder)
            folder.rename(target)
            sync(target.parent)
            sync(self.path)
        except OSError as error:
            raise unwritable(target, error) from None

    def remove(self, job: str, name: str) -> None:
        """Removes a checkpoint; it is none any more from the first moment on.

        Raises:
            CheckpointUnwritable: the disk refuses.
        """
        folder = checkpoint_folder(self.path, job, name)
        leaving = folder.with_name(f"{name}.removed{PARTIAL}")
        try:
            folder.rename(leaving)
            shutil.rmtree(leaving)
        except OSError as error:
            raise unwritable(folder, error) from None

    def _check_sizes(self, folder: Path, manifest: Manifest) -> None:
        for file in manifest.files:
            path = folder / file.name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise unreadable(
                    path, f"is not where its shard wrote it: {error.strerror}"
                ) from None
            if size != file.byte_count:
                raise unreadable(path, f"has {size} bytes, and {file.byte_count} were written")


def check_seen(directory: Path, mark: str) -> None:
    """Whether this process sees and may write the coordinator's directory.

    Args:
        directory: where this process looks for it.
        mark: name of the file that the coordinator has put there.

    Raises:
        CheckpointUnreadable: it does not see it.
        CheckpointUnwritable: it may not write.
    """
    if not _MARKED.fullmatch(mark) or not (directory / mark).exists():
        raise CheckpointUnreadable(
            f"{directory} here is not the directory of checkpoints that the coordinator has: the "
            f"file {mark}, which it has put there, cannot be seen",
            remedy="Mount one file system on the coordinator's machine and on those of all shards; "
            "--checkpoint-dir names it to a shard that has it elsewhere.",
            file=directory / mark,
        )
    probe = directory / f"{mark}.{uuid.uuid4().hex}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritable(directory, error) from None
