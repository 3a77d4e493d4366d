"""A checkpoint in the layouts of others: Hugging Face safetensors, and torch's `optimizer.pt`.

    model.safetensors                     or, above a size, model-00001-of-00003.safetensors, ...
                                          and model.safetensors.index.json
    optimizer.pt                          loads in `torch.optim.Adafactor`, transformers' and ours

Weights go through memory one file at a time. The hyper-parameters in `optimizer.pt` are those of
the step that led to the checkpoint. Two of them do not stand in its record, as the worker had
worked them out already; they are found again in its schedules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from adashard.knobs import EPS_PLACEMENTS, FACTORED_AXES, SEMANTICS, WEIGHT_DECAY_MODES
from adashard.schedule import rho
from adashard.state import State, layout_of, moment_shapes, part_of
from adashard.state_dict import pack
from adashard.wire.messages import AdafactorStep, Content, Schedule
from adashard.wire.placement import Slice, cut
from adashard.wire.spec import AdafactorLayout
from adashard_server.storage.disk import unwritable
from adashard_server.storage.manifest import Manifest, read_manifest
from adashard_server.storage.reading import read_slices

SHARD_BYTES = 5 * 10**9
"""Of a file of weights, at most, as transformers has it; a larger tensor has a file of its own."""

_FLOAT32_BYTES = 4
_DECAY_DIGITS = 9  # of what the logarithms give back of decay_rate

Whole = dict[Content, Tensor]


def export(
    folder: Path, target: Path, *, to_transformers: bool = False, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes a checkpoint's weights and state for others to load.

    Args:
        folder: of the checkpoint.
        target: made where it is missing; files of the same names are replaced.
        to_transformers: whether `optimizer.pt` is to load in `transformers.Adafactor`.
        shard_bytes: of a file of weights, at most.

    Returns:
        The files, in the order in which they were written.

    Raises:
        CheckpointUnreadable: a file or a tensor is not what was written.
        CheckpointUnwritable: the target cannot be written.
    """
    manifest = read_manifest(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        weights = _Weights(folder, manifest, target)
        files = weights.write(list(_shards(manifest, shard_bytes)))
        packed = _optimizer(folder, manifest, weights.rms, to_transformers=to_transformers)
        torch.save(packed, target / "optimizer.pt")
    except (OSError, SafetensorError) as error:
        raise unwritable(target, error) from None
    return [*files, target / "optimizer.pt"]


# --- weights -------------------------------------------------------------------------------------


def _shards(manifest: Manifest, shard_bytes: int) -> Iterator[list[int]]:
    """Parameters by file, in their order."""
    shard, filled = list[int](), 0
    for index, parameter in enumerate(manifest.spec.parameters):
        size = _FLOAT32_BYTES * math.prod(parameter.shape)
        if shard and filled + size > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(index)
        filled += size
    yield shard


class _Weights:
    """Writes a model's weights, and remembers the RMS of each, which transformers asks for."""

    def __init__(self, folder: Path, manifest: Manifest, target: Path) -> None:
        self._folder, self._manifest, self._target = folder, manifest, target
        self.rms: dict[int, float] = {}

    def write(self, shards: Sequence[Sequence[int]]) -> list[Path]:
        """All files, and the index where there are several."""
        if len(shards) == 1:
            return [self._write(shards[0], "model.safetensors")]
        names = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        files = [self._write(shard, name) for shard, name in zip(shards, names, strict=True)]
        parameters = self._manifest.spec.parameters
        index = {
            "metadata": {
                "total_size": sum(_FLOAT32_BYTES * math.prod(one.shape) for one in parameters)
            },
            "weight_map": {
                parameters[number].name: name
                for shard, name in zip(shards, names, strict=True)
                for number in shard
            },
        }
        path = self._target / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")
        return [*files, path]

    def _write(self, shard: Sequence[int], name: str) -> Path:
        parameters = self._manifest.spec.parameters
        whole = {index: {Content.WEIGHT: torch.empty(parameters[index].shape)} for index in shard}
        _read(self._folder, self._manifest, whole)
        for index, contents in whole.items():
            weight = contents[Content.WEIGHT]
            self.rms[index] = float(weight.norm(2)) / weight.numel() ** 0.5
        tensors = {parameters[index].name: one[Content.WEIGHT] for index, one in whole.items()}
        save_file(tensors, self._target / name, metadata={"format": "pt"})
        return self._target / name


def _read(folder: Path, manifest: Manifest, whole: Mapping[int, Whole]) -> None:
    """Fills whole tensors, by parameter, from their slices; in place."""
    pieces = [piece for piece in cut(manifest.spec) if piece.parameter in whole]
    parts = {piece.index: _parts(piece, whole[piece.parameter]) for piece in pieces}
    shapes = {
        index: {content: tuple(part.shape) for content, part in found.items()}
        for index, found in parts.items()
    }
    for index, contents in read_slices(folder, shapes):
        for content, part in parts[index].items():
            part.copy_(contents[content].view(part.shape))


def _parts(piece: Slice, whole: Whole) -> Whole:
    return {content: part_of(tensor, piece, content) for content, tensor in whole.items()}


# --- state ---------------------------------------------------------------------------------------


def _optimizer(
    folder: Path, manifest: Manifest, rms: Mapping[int, float], *, to_transformers: bool
) -> dict[str, Any]:
    """The state dict, with what the checkpoint knows of the settings."""
    spec, record = manifest.spec, manifest.record
    moments = {
        index: {
            content: torch.empty(shape)
            for content, shape in moment_shapes(parameter.shape, layout_of(spec, index)).items()
        }
        for index, parameter in enumerate(spec.parameters)
    }
    _read(folder, manifest, moments)
    state = None
    if record is not None:
        state = State(
            version=manifest.version,
            step_counts=record.step_counts,
            moments=tuple(moments.values()),
            masters={},
        )
    return pack(
        state,
        spec,
        [torch.tensor([rms[index]]) for index in moments],  # all that is asked of weights
        list(_groups(manifest)),
        job=manifest.job,
        to_transformers=to_transformers,
    )


def _groups(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Every group as an optimizer would have it."""
    steps = manifest.record.groups if manifest.record else ()
    for number, group in enumerate(manifest.spec.groups):
        indices = [i for i, one in enumerate(manifest.spec.parameters) if one.group == number]
        settings = dict(SEMANTICS["paper"])
        step = steps[number] if number < len(steps) else None
        if group.adafactor is not None and step is not None and step.adafactor is not None:
            settings |= _settings(group.adafactor, step.adafactor, step.schedules)
        names = [manifest.spec.parameters[index].name for index in indices]
        yield {"semantics": "paper", **settings, "params": indices, "param_names": names}


def _settings(
    layout: AdafactorLayout, step: AdafactorStep, schedules: Sequence[Schedule]
) -> dict[str, Any]:
    """A group's settings, from what of them travels."""
    placement = _word(EPS_PLACEMENTS, layout.eps_placement)
    capped = placement == "clamped"  # torch's step is relative, and lr its cap
    return {
        "semantics": "torch" if capped else "paper",
        "lr": step.lr if step.lr else None,
        "eps": (step.eps1, step.eps2),
        "clip_threshold": step.clip_threshold,
        "decay_rate": _decay_rate(schedules),
        "beta1": step.beta1 if layout.momentum else None,
        "weight_decay": step.weight_decay,
        "scale_parameter": step.scale_parameter,
        "relative_step": capped or not step.lr,
        "warmup_init": not step.lr and any(map(_is_warming, schedules)),
        "eps_placement": placement,
        "factored_axes": _word(FACTORED_AXES, layout.factored_axes),
        "min_dim_size_to_factor": layout.min_dim_size_to_factor,
        "weight_decay_mode": _word(WEIGHT_DECAY_MODES, step.weight_decay_mode),
    }


def _is_warming(one: Schedule) -> bool:
    """Whether the step size is that of the paper's warm-up, and not the usual one."""
    usual, warm = (
        rho(one.step_count, lr=None, relative_step=True, warmup_init=warmup)
        for warmup in (False, True)
    )
    return one.rho == warm != usual


def _decay_rate(schedules: Iterable[Schedule]) -> float:
    """The exponent of beta2 = 1 - count**decay_rate; the default where no schedule shows it."""
    for one in schedules:
        if one.step_count > 1 and one.beta2 < 1.0:
            exponent = math.log(1.0 - one.beta2) / math.log(one.step_count)
            return round(exponent, _DECAY_DIGITS)
    default: float = SEMANTICS["paper"]["decay_rate"]
    return default


def _word(words: Mapping[str, Any], meaning: object) -> str:
    return next(word for word, one in words.items() if one is meaning)
