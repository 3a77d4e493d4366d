"""Checkpoints as shards and a coordinator write them, of small jobs made for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adashard.wire.messages import AdafactorStep, Content, GroupStep, Lineage, Outcome, Record
from adashard.wire.placement import Slice, cut
from adashard.wire.spec import AdafactorLayout, Group, JobSpec, Parameter, Recovery
from adashard.wire.version import VERSION
from adashard_server.storage import manifest as manifests
from adashard_server.storage.checkpoints import CheckpointDirectory, partial_folder
from adashard_server.storage.manifest import Manifest
from adashard_server.storage.snapshot import write_snapshot

Contents = dict[Content, Tensor]
ATTEMPT = "step-{version}.c0de-1"


def spec_of(*shapes: tuple[int, ...], slice_bytes: int = 64, momentum: bool = False) -> JobSpec:
    return JobSpec(
        parameters=tuple(
            Parameter(name=f"layer/{n}.weight", shape=shape) for n, shape in enumerate(shapes)
        ),
        groups=(Group(adafactor=AdafactorLayout(momentum=momentum)),),
        slice_bytes=slice_bytes,
        min_workers=1,
        recovery=Recovery.CHECKPOINT if momentum else Recovery.WORKERS,
    )


SPEC = spec_of((8, 6), (40,), ())


def shapes_of(piece: Slice, *, momentum: bool = False) -> dict[Content, tuple[int, ...]]:
    """What a slice consists of, by the rules for whole tensors of its shape."""
    shapes = {Content.WEIGHT: piece.shape}
    if piece.axes is None:
        shapes[Content.VECTOR] = piece.shape
    else:
        row, column = piece.axes
        shapes[Content.ROW] = piece.shape[:column] + piece.shape[column + 1 :]
        shapes[Content.COLUMN] = piece.shape[:row] + piece.shape[row + 1 :]
    if momentum:
        shapes[Content.MOMENTUM] = piece.shape
    return shapes


def filled(spec: JobSpec, seed: int = 0) -> dict[int, Contents]:
    """Slices full of numbers, no two tensors with the same."""
    generator = torch.Generator().manual_seed(seed)
    momentum = spec.groups[0].adafactor.momentum
    return {
        piece.index: {
            content: torch.randn(shape, generator=generator)
            for content, shape in shapes_of(piece, momentum=momentum).items()
        }
        for piece in cut(spec)
    }


def record_of(version: int, spec: JobSpec) -> Record:
    return Record(
        step=version,
        workers=("worker-a",),
        shares=(1.0,),
        outcome=Outcome.APPLY,
        present=b"\x07",
        step_counts=(version,) * len(spec.parameters),
        groups=(GroupStep(adafactor=AdafactorStep(eps1=1e-30, eps2=1e-3, clip_threshold=1.0)),),
    )


def stored(
    directory: Path,
    held: Mapping[int, Contents],
    spec: JobSpec = SPEC,
    *,
    placement: Sequence[int] | None = None,
    version: int = 5,
    job: str = "job",
    **others: object,
) -> Path:
    """Has every shard write what `placement` gives it, and makes a checkpoint of it."""
    placement = tuple(placement) if placement else (0,) * len(held)
    attempt = ATTEMPT.format(version=version)
    folder = partial_folder(directory, job, attempt)
    files = []
    for shard in sorted(set(placement)):
        mine = {index: one for index, one in held.items() if placement[index] == shard}
        written, _ = write_snapshot(folder, shard, spec, cut(spec), mine)
        files += written
    made = Manifest(
        **{
            "format": manifests.FORMAT,
            "adashard": VERSION,
            "job": job,
            "name": f"step-{version}",
            "version": version,
            "generation": 3,
            "lineage": Lineage(number=1, origin="worker-a"),
            "spec": spec,
            "placement": placement,
            "files": tuple(files),
            "record": record_of(version, spec) if version else None,
        }
        | others
    )
    CheckpointDirectory(directory).commit(made, attempt)
    return directory / job / f"step-{version}"


def same(one: Mapping[Content, Tensor], other: Mapping[Content, Tensor]) -> bool:
    """Whether a slice has the same bits, whatever its shape is written as."""
    return one.keys() == other.keys() and all(
        torch.equal(one[content].reshape(-1), other[content].reshape(-1)) for content in one
    )
