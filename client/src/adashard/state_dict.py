"""Optimizer state as a dict that can be saved: that of `torch.optim.Adafactor`, or transformers'.

`pack` writes a dict that loads there: the moments under the library's names and in its shapes, and
its settings beside ours. `unpack` reads what `pack` has written and what the two libraries write
themselves, and checks it against the model before anything is changed.

Two settings have one name and two meanings. torch knows no step without an `lr`, and its eps1 is a
lower bound of the square root where ours, by default, is added to the square. They stand in the
dict as the library means them. Ours stand beside them, and come back unless somebody has changed
the library's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adashard.knobs import WIRE_DTYPES, lr_counts
from adashard.state import MOMENTS, Moments, State, moment_shapes, zero_moments
from adashard.wire.errors import InvalidRequest, InvalidSettings, ModelMismatch
from adashard.wire.messages import Content
from adashard.wire.placement import factored_axes
from adashard.wire.spec import AdafactorLayout, JobSpec, Parameter

REMOTE = "remote"
"""The key of what a dict has for us alone: job, version, float32 masters, and "wire"."""

WIRE = "wire"
"""There, the key of how one worker's gradients travel: "dtype" and "residuals" by parameter."""

OURS = "adashard"
"""In a group, the key of our settings that share their name with another one's."""

_TORCH_CAP = 1e-2  # of the relative step: what torch takes from lr, and the paper says


@dataclass(frozen=True, slots=True)
class _Library:
    """How a library writes Adafactor's state.

    Attributes:
        names: of the moments.
        keeps_axes: whether means keep the averaged axis, with length one.
        eps_placement: what its eps1 means.
    """

    names: Mapping[Content, str]
    keeps_axes: bool
    eps_placement: str

    def shape(
        self, content: Content, shape: tuple[int, ...], axes: tuple[int, int] | None
    ) -> tuple[int, ...]:
        """The shape of a moment whose shape here is `shape`."""
        averaged = _averaged(content, axes)
        if averaged is None or not self.keeps_axes:
            return shape
        return (*shape[:averaged], 1, *shape[averaged:])


_TORCH = _Library(
    {
        Content.ROW: "row_var",
        Content.COLUMN: "col_var",
        Content.VECTOR: "variance",
        Content.MOMENTUM: "exp_avg",
    },
    keeps_axes=True,
    eps_placement="clamped",
)
_TRANSFORMERS = _Library(
    {
        Content.ROW: "exp_avg_sq_row",
        Content.COLUMN: "exp_avg_sq_col",
        Content.VECTOR: "exp_avg_sq",
        Content.MOMENTUM: "exp_avg",
    },
    keeps_axes=False,
    eps_placement="added",
)
_LIBRARIES = (_TORCH, _TRANSFORMERS)


def _averaged(content: Content, axes: tuple[int, int] | None) -> int | None:
    """The axis of the parameter that a mean is taken over."""
    if axes is None or content not in (Content.ROW, Content.COLUMN):
        return None
    row, column = axes
    return column if content is Content.ROW else row


# --- from state to a dict ------------------------------------------------------------------------


def pack(
    state: State | None,
    spec: JobSpec,
    weights: Sequence[Tensor],
    groups: Sequence[Mapping[str, Any]],
    *,
    job: str,
    to_transformers: bool,
    wire: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The dict of a state; it can be loaded with `torch.load(..., weights_only=True)`.

    Args:
        state: None for a job that has not begun.
        spec: the model.
        weights: its parameters, of which transformers wants to know the RMS.
        groups: the optimizer's param groups.
        job: its name.
        to_transformers: whether it is to load in `transformers.Adafactor` instead of torch's.
        wire: of the worker that saves; None or empty for nothing of it.
    """
    library = _TRANSFORMERS if to_transformers else _TORCH
    remote: dict[str, Any] = {"job": job, "version": 0, "masters": {}}
    if wire:
        remote[WIRE] = dict(wire)
    entries: dict[int, dict[str, Any]] = {}
    if state is not None:
        remote.update(version=state.version, masters=dict(state.masters))
        for index, parameter in enumerate(spec.parameters):
            axes = factored_axes(parameter.shape, _layout(spec, parameter))
            entry = _begin_entry(library, state.step_counts[index], weights[index])
            for content, moment in state.moments[index].items():
                shape = library.shape(content, tuple(moment.shape), axes)
                entry[library.names[content]] = moment.reshape(shape)
            entries[index] = entry
    return {"state": entries, "param_groups": list(_packed(groups, library)), REMOTE: remote}


def _begin_entry(library: _Library, step_count: int, weight: Tensor) -> dict[str, Any]:
    if library is _TORCH:
        return {"step": torch.tensor(float(step_count), dtype=torch.float32)}
    rms = float(weight.detach().float().norm(2)) / weight.numel() ** 0.5
    return {"step": step_count, "RMS": rms}


def _packed(groups: Sequence[Mapping[str, Any]], library: _Library) -> Iterator[dict[str, Any]]:
    """The groups with numbers in the place of their parameters."""
    first = 0
    for group in groups:
        count = len(group["params"])
        settings = {name: value for name, value in group.items() if name != "params"}
        settings |= _settings_for(library, group)
        yield {**settings, "params": list(range(first, first + count))}
        first += count


def _settings_for(library: _Library, group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings under the names of a library, and ours that these would hide."""
    lr = group["lr"] if lr_counts(group, group["semantics"]) else None
    settings: dict[str, Any] = {
        OURS: {"lr": lr, "eps": tuple(group["eps"])},
        "lr": lr,
        "eps": _eps_for(library, group),
    }
    if library is _TORCH:
        settings |= {
            "lr": _TORCH_CAP if lr is None else lr,
            "beta2_decay": group["decay_rate"],
            "d": group["clip_threshold"],
            "foreach": None,
            "maximize": False,
        }
    return settings


def _eps_for(library: _Library, group: Mapping[str, Any]) -> tuple[float, float]:
    """A group's eps as a library means it: added to the square, or a bound of its root."""
    eps1, eps2 = group["eps"]
    if group["eps_placement"] == library.eps_placement:
        return eps1, eps2
    return (math.sqrt(eps1) if library.eps_placement == "clamped" else eps1**2), eps2


# --- from a dict to groups -----------------------------------------------------------------------


def merged_groups(
    groups: Sequence[Mapping[str, Any]], saved: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The optimizer's groups with the settings of a dict; its parameters and their names stay.

    Args:
        groups: the optimizer's, not changed.
        saved: the dict.

    Raises:
        InvalidRequest: it is no dict of an optimizer.
        ModelMismatch: its groups are others.
        InvalidSettings: it maximizes.
    """
    if not isinstance(saved.get("state"), Mapping) or not isinstance(
        saved.get("param_groups"), Sequence
    ):
        raise InvalidRequest(
            "a state dict has 'state' and 'param_groups'; this one has "
            f"{', '.join(map(repr, saved)) or 'nothing'}",
            remedy="Give what state_dict() of an Adafactor has returned.",
        )
    theirs = saved["param_groups"]
    if len(theirs) != len(groups):
        raise _mismatch(f"{len(theirs)} groups in the state dict, {len(groups)} here")
    for number, (here, there) in enumerate(zip(groups, theirs, strict=True)):
        counts = len(there["params"]), len(here["params"])
        if counts[0] != counts[1]:
            raise _mismatch(
                f"group {number} has {counts[0]} parameters in the state dict, {counts[1]} here"
            )
        _compare_order(here.get("param_names"), there.get("param_names"))
    return [_merged(here, there) for here, there in zip(groups, theirs, strict=True)]


def _compare_order(here: Sequence[str] | None, there: Sequence[str] | None) -> None:
    """Refuses the same names in another order; other names say nothing, as in torch."""
    if here and there and sorted(here) == sorted(there):
        for mine, saved in zip(here, there, strict=True):
            if mine != saved:
                raise _mismatch(f"parameter {saved!r} of the state dict is {mine!r} here")


def _merged(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    if there.get("maximize"):
        raise InvalidSettings(
            "maximize=True in the state dict: Adashard does not maximize",
            remedy="Negate the loss, and set maximize to False in the dict.",
        )
    kept = {name: here[name] for name in ("params", "param_names") if name in here}
    settings = _own(there) if "semantics" in there else _foreign(here, there)
    merged = {**here, **settings, **kept}
    if not lr_counts(merged, merged["semantics"]):
        merged["lr"] = None
    return merged


def _own(there: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were ours, also where a library has saved them again."""
    hidden = dict(there.get(OURS, {}))
    original = {**there, **hidden}
    settings = {name: value for name, value in there.items() if name not in (OURS, *_TORCH_ONLY)}
    for name, value in hidden.items():
        if any(_same(there[name], _settings_for(one, original)[name]) for one in _LIBRARIES):
            settings[name] = value
    return settings


def _same(one: object, other: object) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, tuple):
        return tuple(one) == other
    return bool(one == other)


_TORCH_ONLY = ("beta2_decay", "d", "foreach", "maximize")
_TORCH_NAMES = {"decay_rate": "beta2_decay", "clip_threshold": "d"}


def _foreign(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a library in our words; what has no meaning there or another here stays ours."""
    settings = {name: value for name, value in there.items() if name not in _TORCH_ONLY}
    settings |= {ours: there[name] for ours, name in _TORCH_NAMES.items() if name in there}
    placement = "clamped" if "beta2_decay" in there else "added"
    if "eps" in there:
        same = placement == here["eps_placement"]
        settings["eps"] = (there["eps"][0] if same else here["eps"][0], there["eps"][1])
    if settings.get("lr") is None:
        settings["lr"] = here["lr"]
    return settings


# --- from a dict to state ------------------------------------------------------------------------


def unpack(saved: Mapping[str, Any], spec: JobSpec) -> State | None:
    """The state in a dict; None where it has not taken a step.

    Args:
        saved: a dict whose groups have passed `merged_groups`.
        spec: the model, with the settings of these groups.

    Raises:
        ModelMismatch: of another model: the first tensor that differs, and both shapes.
        InvalidRequest: a number that no optimizer can have come to.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    remote = _remote(saved.get(REMOTE))
    counts, all_moments, masters = [], [], {}
    for index, (number, parameter) in enumerate(zip(numbers, spec.parameters, strict=True)):
        entry = saved["state"].get(number, {})
        reader = _Reader(index, parameter, _layout(spec, parameter))
        counts.append(reader.step_count(entry))
        all_moments.append(reader.moments(entry))
        if index in remote["masters"]:
            masters[index] = reader.whole("master", remote["masters"][index])
    version = max(remote["version"], *counts)
    if version == 0:
        return None
    return State(
        version=version,
        step_counts=tuple(counts),
        moments=tuple(all_moments),
        masters=masters,
    )


def unpack_wire(saved: Mapping[str, Any], spec: JobSpec) -> dict[str, Any]:
    """How the gradients of the worker that saved a dict travelled: "dtype" and "residuals".

    Args:
        saved: a dict that has passed `unpack`.
        spec: the model.

    Raises:
        ModelMismatch: a residual is of another shape than its parameter.
        InvalidRequest: it is not what `state_dict()` has written.
    """
    wire = (saved.get(REMOTE) or {}).get(WIRE, {"dtype": None, "residuals": {}})
    if not isinstance(wire, Mapping) or not isinstance(wire.get("residuals"), Mapping):
        raise _not_ours()
    if wire.get("dtype") not in (*WIRE_DTYPES, None):
        raise _not_ours()
    residuals = {}
    for index, residual in wire["residuals"].items():
        there = type(index) is int and 0 <= index < len(spec.parameters)
        if not there or not isinstance(residual, Tensor):
            raise _not_ours()
        parameter = spec.parameters[index]
        reader = _Reader(index, parameter, _layout(spec, parameter))
        residuals[index] = reader.whole("residual", residual)
    return {"dtype": wire["dtype"], "residuals": residuals}


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads what a dict has of one parameter, and refuses what cannot be right."""

    index: int
    parameter: Parameter
    layout: AdafactorLayout

    def step_count(self, entry: Mapping[str, Any]) -> int:
        step = float(entry.get("step", 0))
        if not step.is_integer() or step < 0:
            raise self._impossible("step", f"is {step}")
        return int(step)

    def moments(self, entry: Mapping[str, Any]) -> Moments:
        """The moments in our shapes; zeros for a parameter that was never updated."""
        shape = self.parameter.shape
        shapes = moment_shapes(shape, self.layout)
        names = {name for library in _LIBRARIES for name in library.names.values()}
        found = {name: entry[name] for name in entry if name in names}
        if not found and self.step_count(entry) == 0:
            return zero_moments(shape, self.layout)
        library = _TORCH if {"row_var", "variance"} & set(found) else _TRANSFORMERS
        axes = factored_axes(shape, self.layout)
        here = {library.names[one]: library.shape(one, shapes[one], axes) for one in shapes}
        there = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if here != there:
            raise _mismatch(
                f"parameter {self.index} {self.parameter.name!r} {shape} has "
                f"{_listed(there)} in the state dict, {_listed(here)} here"
            )
        return {
            content: self._checked(library.names[content], found, content).view(shapes[content])
            for content in MOMENTS
            if content in shapes
        }

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that has the parameter's shape: its master, or its residual."""
        shape = self.parameter.shape
        if tuple(tensor.shape) != shape:
            raise _mismatch(
                f"parameter {self.index} {self.parameter.name!r} has a {name} of "
                f"{tuple(tensor.shape)} in the state dict, {shape} here"
            )
        return self._finite(name, tensor)

    def _checked(self, name: str, found: Mapping[str, Tensor], content: Content) -> Tensor:
        moment = self._finite(name, found[name])
        if content is not Content.MOMENTUM and bool((moment < 0).any()):
            raise self._impossible(name, "has a negative element, and is a mean of squares")
        return moment

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in float32 on the CPU, in one piece."""
        ours = tensor.detach().to("cpu", torch.float32).contiguous()
        if not bool(torch.isfinite(ours).all()):
            raise self._impossible(name, "has NaN or Inf in it")
        return ours

    def _impossible(self, name: str, what: str) -> InvalidRequest:
        return InvalidRequest(
            f"{name} of parameter {self.index} {self.parameter.name!r} {what} in the state dict",
            remedy="Load a state that was saved before.",
            parameter=self.parameter.name,
        )


def _remote(saved: object) -> dict[str, Any]:
    """What the dict has for us alone, with what is left out."""
    if saved is None:
        return {"version": 0, "masters": {}}
    if isinstance(saved, Mapping):
        version, masters = saved.get("version"), saved.get("masters", {})
        if type(version) is int and version >= 0 and isinstance(masters, Mapping):
            return {"version": version, "masters": masters}
    raise _not_ours()


def _not_ours() -> InvalidRequest:
    return InvalidRequest(f"{REMOTE!r} in the state dict is not what state_dict() has written")


def _layout(spec: JobSpec, parameter: Parameter) -> AdafactorLayout:
    layout = spec.groups[parameter.group].adafactor
    assert layout is not None
    return layout


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "nothing"


def _mismatch(what: str) -> ModelMismatch:
    return ModelMismatch(
        f"the state dict is of another model: {what}",
        remedy="Build the model and the param groups that it was saved with.",
    )
