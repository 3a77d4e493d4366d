"""The disk: its refusals in words of the catalogue, and what outlives a power loss."""

from __future__ import annotations

import os
from pathlib import Path

from adashard.wire.errors import CheckpointUnreadable, CheckpointUnwritable


def unreadable(path: Path, what: str, *, tensor: str = "") -> CheckpointUnreadable:
    """The error that a file is not what it should be; it names the file, and the tensor if any."""
    facts = {"tensor": tensor} if tensor else {}
    return CheckpointUnreadable(f"{path} {what}", remedy=None, file=path, **facts)


def unwritable(path: Path, error: Exception) -> CheckpointUnwritable:
    """The error that a file cannot be written; it names the file and says why."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CheckpointUnwritable(f"{path} cannot be written: {why}", file=path)


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, outlive a power loss.

    Raises:
        OSError: they cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
