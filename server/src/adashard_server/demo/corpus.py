"""What the demo reads: the source files of the running Python's standard library, as bytes.

They are on every machine, they are text that people wrote, and nobody has to download anything.
Which files are held out is decided by a hash of their paths alone: the same on every machine, in
every run and for every seed, however many files there are. Batches never see them.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

HELD_OUT_SHARE = 1 / 20
SKIPPED = frozenset(
    {
        "site-packages",
        "dist-packages",
        # Left out by some distributions: without them machines agree more nearly.
        "test",
        "tests",
        "idle_test",
        # Tables, each much like the next: known ones would give the held-out ones away.
        "encodings",
    }
)
END_OF_FILE = b"\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Text on its two sides.

    Attributes:
        training: all training files one after the other, uint8 (bytes,), each ended by a zero.
        held_out: the same of the held-out files.
        training_files: number of files in `training`.
        held_out_files: number of files in `held_out`.
    """

    training: Tensor
    held_out: Tensor
    training_files: int
    held_out_files: int


def read_corpus(root: Path | None = None) -> Corpus:
    """Reads every `.py` file under `root`, in order of path.

    Args:
        root: None for the standard library of this Python.

    Raises:
        FileNotFoundError: one side has no text, as where the library is packed in an archive.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    training: list[bytes] = []
    held_out: list[bytes] = []
    for path in _sources(root):
        (held_out if is_held_out(path) else training).append((root / path).read_bytes())
    if not (any(training) and any(held_out)):
        raise FileNotFoundError(f"{root} holds no Python sources to train on and to hold out")
    return Corpus(
        training=_joined(training),
        held_out=_joined(held_out),
        training_files=len(training),
        held_out_files=len(held_out),
    )


def is_held_out(path: PurePosixPath) -> bool:
    """Whether the file at this path, relative to the library's root, is never trained on."""
    digest = hashlib.blake2b(str(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def batches(text: Tensor, *, count: int, length: int, stream: str) -> Iterator[Tensor]:
    """Draws batches without end: windows that start anywhere in `text`.

    Args:
        text: uint8 (bytes,).
        count: windows in a batch.
        length: bytes in a window, at most those in `text`.
        stream: names the sequence of draws; each worker of each seed has one of its own.

    Yields:
        int64 (count, length), owned by the caller.
    """
    draw = random.Random(stream)
    starts = range(len(text) - length + 1)
    while True:
        yield _windows(text, draw.choices(starts, k=count), length)


def sample(text: Tensor, *, count: int, length: int) -> Tensor:
    """The same windows every time, spread evenly: int64 (at most count, length), no overlap."""
    count = min(count, len(text) // length)
    return _windows(text, (index * len(text) // count for index in range(count)), length)


def _sources(root: Path) -> list[PurePosixPath]:
    """Paths below `root` in an order that all file systems agree on."""
    found = (PurePosixPath(path.relative_to(root).as_posix()) for path in root.rglob("*.py"))
    return sorted(path for path in found if SKIPPED.isdisjoint(path.parts))


def _joined(files: list[bytes]) -> Tensor:
    text = b"".join(content + END_OF_FILE for content in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _windows(text: Tensor, starts: Iterable[int], length: int) -> Tensor:
    return torch.stack([text[start : start + length] for start in starts]).long()
