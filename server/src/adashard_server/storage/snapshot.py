"""One shard's part of a checkpoint: files of whole slices, weights apart from state.

A tensor is named after its parameter and its slice's place in it, `wte.weight/3`, and in files of
state after its kind too, `wte.weight/3/row`. Each file holds a checksum of every tensor beside it,
so that whoever reads one slice can trust it without reading the rest, and damage has a name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from adashard.wire.checksums import extended
from adashard.wire.control import SnapshotFile
from adashard.wire.messages import Content
from adashard.wire.placement import Slice
from adashard.wire.spec import JobSpec
from adashard.wire.tensors import as_buffer, flat_on_cpu
from adashard_server.storage.disk import sync, unwritable

Contents = Mapping[Content, Tensor]

SLICES_PER_FILE = 20_000  # with the longest names allowed, headers stay below safetensors' 100 MB
_KINDS = {
    Content.ROW: "row",
    Content.COLUMN: "column",
    Content.VECTOR: "vector",
    Content.MOMENTUM: "momentum",
}


def tensor_name(spec: JobSpec, piece: Slice, content: Content) -> str:
    """The name that one tensor of a slice has in its file."""
    name = f"{spec.parameters[piece.parameter].name}/{piece.place}"
    return name if content is Content.WEIGHT else f"{name}/{_KINDS[content]}"


def write_snapshot(
    folder: Path, shard: int, spec: JobSpec, slices: Sequence[Slice], held: Mapping[int, Contents]
) -> tuple[tuple[SnapshotFile, ...], tuple[int, ...]]:
    """Writes and syncs a shard's slices; takes as long as the disk does.

    Args:
        folder: made where it is missing.
        shard: its number among those of the checkpoint.
        spec: the job.
        slices: all of the job, by index.
        held: what the shard has, by slice; on any device, in the shapes of their parts.

    Returns:
        The files, and the slices with elements that are NaN or infinite, ascending.

    Raises:
        CheckpointUnwritable: no room, no permission, or no such file system; it names the file.
    """
    files = list[SnapshotFile]()
    indices = sorted(held)
    for number, first in enumerate(range(0, len(indices), SLICES_PER_FILE)):
        suffix = f"-{number}" if number else ""
        for kind in ("weights", "state"):
            tensors = {
                tensor_name(spec, slices[index], content): tensor
                for index in indices[first : first + SLICES_PER_FILE]
                for content, tensor in held[index].items()
                if (content is Content.WEIGHT) == (kind == "weights")
            }
            path = folder / f"shard-{shard}-{kind}{suffix}.safetensors"
            files.append(_write(path, tensors))
    not_finite = tuple(index for index in indices if not all(_finite(held[index])))
    return tuple(files), not_finite


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's elements, in row-major order, as hexadecimal digits."""
    return f"{extended(0, as_buffer(flat_on_cpu(tensor))):08x}"


def _finite(contents: Contents) -> Iterator[bool]:
    return (bool(torch.isfinite(tensor).all()) for tensor in contents.values())


def _write(path: Path, tensors: Mapping[str, Tensor]) -> SnapshotFile:
    """Writes and syncs one file; what is there of its name is replaced."""
    ours = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checksums = {name: checksum(tensor) for name, tensor in ours.items()}
        save_file(ours, path, metadata=checksums)
        path.chmod(0o644)  # safetensors lets nobody else read it
        sync(path)
        with path.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
            byte_count = written.tell()
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from None
    return SnapshotFile(name=path.name, byte_count=byte_count, sha256=sha256)
