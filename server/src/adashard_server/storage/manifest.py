"""What a checkpoint is: the file that makes shards' snapshots one whole.

The manifest is JSON that people can read, one field a line. It is written last and names every
other file with size and SHA-256.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adashard.wire.control import SnapshotFile
from adashard.wire.errors import InvalidRequest
from adashard.wire.messages import Lineage, Record
from adashard.wire.placement import cut, validate_spec
from adashard.wire.plain import from_plain, to_plain
from adashard.wire.spec import JobSpec
from adashard_server.storage.disk import unreadable

FORMAT = 1
NAME = "manifest.json"

MANIFEST_BYTES_MAX = 1 << 28
FILES_MAX = 1 << 16
_BYTES = "hex"  # the only key of a map that stands for bytes
_FILE_NAME = re.compile(r"shard-[0-9]+-(weights|state)(-[0-9]+)?\.safetensors")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A job at one version.

    Attributes:
        format: of the checkpoint; another one is refused.
        adashard: version of the distribution that wrote it.
        job: the job's name, which its folder may have to spell differently.
        name: of the checkpoint, unique in its job.
        version: steps that every slice in it has taken.
        generation: the one in which all slices were cut.
        lineage: of which they were cut.
        spec: the job: shapes, layouts, and the `slice_bytes` that its bits depend on.
        record: of step `version`, without partials: step counts and hyper-parameters; None where
            nothing has been stepped.
        placement: by slice, the number of the shard whose files it is in.
        files: all but the manifest itself.
        values: what workers had logged last, as means, e.g. "loss"; only those that are finite.
        not_finite: names of the tensors and logged values that were not.
        kept: whether it was asked for by name, and is never rotated out.
        written_at_s: when, in seconds since 1970.
    """

    format: int
    adashard: str
    job: str
    name: str
    version: int
    generation: int
    lineage: Lineage
    spec: JobSpec
    placement: tuple[int, ...]
    files: tuple[SnapshotFile, ...]
    record: Record | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    not_finite: tuple[str, ...] = ()
    kept: bool = False
    written_at_s: float = 0.0

    @property
    def byte_count(self) -> int:
        """Bytes of all files."""
        return sum(file.byte_count for file in self.files)


def to_json(manifest: Manifest) -> str:
    """The manifest as it is stored, one field a line."""
    lines = (
        f" {json.dumps(name)}: {json.dumps(value, default=_of_bytes, allow_nan=False)}"
        for name, value in to_plain(manifest).items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointUnreadable: there is none, it is damaged, or of a format not known here.
    """
    path = folder / NAME
    try:
        size = path.stat().st_size
        if size > MANIFEST_BYTES_MAX:
            raise unreadable(path, f"has {size} bytes; {MANIFEST_BYTES_MAX} are allowed")
        data = json.loads(path.read_bytes(), object_hook=_to_bytes)
    except FileNotFoundError:
        raise unreadable(path, "is not there: the checkpoint was never completed") from None
    except OSError as error:
        raise unreadable(path, f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"is damaged: {error}") from None
    return _checked(path, data)


def _checked(path: Path, data: object) -> Manifest:
    found = data.get("format") if isinstance(data, Mapping) else None
    if found != FORMAT:
        raise unreadable(path, f"has format {found!r}, and {FORMAT} is what can be read here")
    try:
        manifest = from_plain(Manifest, data)
        validate_spec(manifest.spec)
    except InvalidRequest as error:
        raise unreadable(path, f"is damaged: {error.message}") from None
    if problem := _problem(manifest):
        raise unreadable(path, f"is damaged: {problem}")
    return manifest


def _problem(manifest: Manifest) -> str:
    """What cannot be right in a manifest of the right types; empty if nothing."""
    record, count = manifest.record, len(manifest.spec.parameters)
    if manifest.version < 0 or manifest.generation < 1:
        return f"version {manifest.version} of generation {manifest.generation}"
    if len(manifest.placement) != len(cut(manifest.spec)) or min(manifest.placement) < 0:
        return f"{len(manifest.placement)} slices are placed, and the job has others"
    if record is not None and (record.step, len(record.step_counts)) != (manifest.version, count):
        return f"the record is of step {record.step} and {len(record.step_counts)} parameters"
    if not 1 <= len(manifest.files) <= FILES_MAX:
        return f"{len(manifest.files)} files"
    for file in manifest.files:
        whole = file.byte_count >= 0 and _SHA256.fullmatch(file.sha256)
        if not (whole and _FILE_NAME.fullmatch(file.name)):
            return f"the file {file.name!r} of {file.byte_count} bytes"
    return ""


def _of_bytes(value: object) -> dict[str, str]:
    assert isinstance(value, bytes)
    return {_BYTES: value.hex()}


def _to_bytes(found: dict[str, object]) -> object:
    """Bytes are maps of one entry in JSON, which has no form for them."""
    if found.keys() == {_BYTES} and isinstance(text := found[_BYTES], str):
        return bytes.fromhex(text)
    return found
