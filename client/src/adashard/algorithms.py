"""Adafactor as a worker sees it: its settings, what they mean when left out, and what contradicts.

A *knob* is a hyper-parameter as the user gives it; None means "what the semantics says". `resolve`
turns knobs into *settings*: every value stated, checked, and of one type. Param groups hold
settings, live: what a scheduler writes into `param_groups[i]["lr"]` travels with the next push.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from adashard import schedule
from adashard.optimizer import RemoteOptimizer
from adashard.wire.errors import InvalidSettings
from adashard.wire.messages import AdafactorStep, GroupStep, Schedule
from adashard.wire.spec import AdafactorLayout, EpsPlacement, FactoredAxes, Group, WeightDecayMode

FACTORED_AXES = {"last_two": FactoredAxes.LAST_TWO, "largest_two": FactoredAxes.LARGEST_TWO}
WEIGHT_DECAY_MODES = {
    "alpha": WeightDecayMode.ALPHA,
    "lr": WeightDecayMode.LR,
    "plain": WeightDecayMode.PLAIN,
}
EPS_PLACEMENTS = {"paper": EpsPlacement.ADDED, "torch": EpsPlacement.CLAMPED}

_PAPER: dict[str, Any] = {
    "lr": None,
    "eps": (1e-30, 1e-3),
    "clip_threshold": 1.0,
    "decay_rate": -0.8,
    "beta1": None,
    "weight_decay": 0.0,
    "scale_parameter": True,
    "relative_step": True,
    "warmup_init": False,
    "factored_axes": "last_two",
    "min_dim_size_to_factor": 1,
    "weight_decay_mode": "alpha",
}
_TORCH = {
    **_PAPER,
    "lr": 1e-2,
    # torch takes it from the parameter's dtype; weights on a shard are float32 whatever that is.
    "eps": (torch.finfo(torch.float32).eps, 1e-3),
    "weight_decay_mode": "lr",
}
SEMANTICS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"paper": _PAPER, "torch": _TORCH})
"""What each knob means when it is left at None."""

KNOBS = tuple(_PAPER)
"""Names of all knobs, in the order of the constructor."""


class Adafactor(RemoteOptimizer):
    """Adafactor whose weights and state live on shards.

    Takes the place of `transformers.Adafactor` or `torch.optim.Adafactor` in a training script.
    Every knob may stand in a param group of its own; one left at None, there or here, means what
    `semantics` says:

    - `"paper"`: Adafactor as published, and transformers' defaults. The step is relative: it needs
      no learning rate, and refuses one unless `relative_step=False`.
    - `"torch"`: `torch.optim.Adafactor`. `lr` caps the relative step, eps1 is a lower bound
      instead of a summand, weight decay is multiplied with `lr`.

    Args:
        params: tensors, groups, or named pairs as `model.named_parameters()` gives them.
        lr: learning rate, a number or a tensor of one element. paper: None, also in the param
            groups, so schedulers need `relative_step=False`; torch: 1e-2.
        eps: (eps1, eps2): regularisation of the squared gradient, and the least scale that a
            parameter counts with. paper: (1e-30, 1e-3); torch: (1.19e-7, 1e-3).
        clip_threshold: RMS that updates are clipped to, 1.0; infinity clips nothing.
        decay_rate: the second moment keeps 1 - t^decay_rate of itself in step t; -0.8.
        beta1: decay of the first moment; None has none, and needs no memory for it.
        weight_decay: 0.0. What it is multiplied with, `weight_decay_mode` says.
        scale_parameter: whether the step is multiplied with the RMS of the parameter; True.
        relative_step: whether the step size falls with 1 / sqrt(t); True. If not, it is `lr`.
        warmup_init: whether the relative step grows by 1e-6 a step at first; False. paper only.
        semantics: what knobs mean that are left out, and where eps1 enters.
        factored_axes: "last_two", or "largest_two" (as optax and T5 do).
        min_dim_size_to_factor: both factored axes must be at least this long, 1; otherwise the
            second moment is kept whole.
        weight_decay_mode: weights shrink by weight_decay times "alpha" (the step size, with the
            parameter's scale; paper), times "lr" (torch), or by itself ("plain").
        slice_bytes: largest piece that a parameter is placed in; None for the server's default.
        address: host:port of the coordinator; None for `ADASHARD_ADDRESS`.
        job: name of the training; workers of one job train one model together.
        min_workers: how many workers the first step waits for.
        nonfinite: "reject" raises for a gradient that is not finite, before anything is sent;
            "skip" has all workers skip the step.
        on_existing: what to do where the job exists: "resume" it, "replace" it, or "error".
        token: the cluster's; None for `ADASHARD_TOKEN`.

    Raises:
        InvalidSettings: a value has no meaning, or two contradict each other; both are named.

    References:
        Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        eps: tuple[float | None, float | None] | None = None,
        clip_threshold: float | None = None,
        decay_rate: float | None = None,
        beta1: float | None = None,
        weight_decay: float | None = None,
        scale_parameter: bool | None = None,
        relative_step: bool | None = None,
        warmup_init: bool | None = None,
        *,
        semantics: str = "paper",
        factored_axes: str | None = None,
        min_dim_size_to_factor: int | None = None,
        weight_decay_mode: str | None = None,
        slice_bytes: int | None = None,
        address: str | None = None,
        job: str = "default",
        min_workers: int = 1,
        nonfinite: str = "reject",
        on_existing: str = "resume",
        token: str | None = None,
    ) -> None:
        knobs = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "factored_axes": factored_axes,
            "min_dim_size_to_factor": min_dim_size_to_factor,
            "weight_decay_mode": weight_decay_mode,
        }
        super().__init__(
            params,
            {**knobs, "semantics": semantics},
            address=address,
            job=job,
            slice_bytes=slice_bytes,
            min_workers=min_workers,
            nonfinite=nonfinite,
            on_existing=on_existing,
            token=token,
        )

    def _resolve_group(self, group: dict[str, Any]) -> None:
        """Puts settings in the place of the group's knobs."""
        group.update(resolve(group, group["semantics"]))

    def _layout(self, group: dict[str, Any]) -> Group:
        """What of the group's settings is fixed once the job knows it."""
        return Group(adafactor=layout(group))

    def _group_step(self, group: dict[str, Any], step_counts: Collection[int]) -> GroupStep:
        """The group's settings as they are now, with the schedules of every step count."""
        settings = settings_now(group)
        return GroupStep(
            adafactor=adafactor_step(settings), schedules=schedules(settings, step_counts)
        )


# --- from a group's settings to messages ----------------------------------------------------------


def layout(group: Mapping[str, Any]) -> AdafactorLayout:
    """What the settings of a param group make of its state on a shard."""
    return AdafactorLayout(
        factored_axes=FACTORED_AXES[group["factored_axes"]],
        min_dim_size_to_factor=group["min_dim_size_to_factor"],
        momentum=group["beta1"] is not None,
        eps_placement=EPS_PLACEMENTS[group["semantics"]],
    )


def settings_now(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a live param group for one step, checked again: schedulers write there.

    `lr` is None where the step does not use it. Under "paper" a relative step does not, whatever
    a scheduler has written, as in transformers.

    Raises:
        InvalidSettings: a value that was written has no meaning.
    """
    group = dict(group)
    if group["semantics"] == "paper" and group["relative_step"]:
        group["lr"] = None
    return resolve(group, group["semantics"])


def adafactor_step(settings: Mapping[str, Any]) -> AdafactorStep:
    """Hyper-parameters of one step, as they travel."""
    eps1, eps2 = settings["eps"]
    return AdafactorStep(
        eps1=eps1,
        eps2=eps2,
        clip_threshold=settings["clip_threshold"],
        beta1=settings["beta1"] or 0.0,
        weight_decay=settings["weight_decay"],
        weight_decay_mode=WEIGHT_DECAY_MODES[settings["weight_decay_mode"]],
        scale_parameter=settings["scale_parameter"],
        lr=float(settings["lr"] or 0.0),
    )


def schedules(settings: Mapping[str, Any], step_counts: Iterable[int]) -> tuple[Schedule, ...]:
    """beta2 and rho for every step count, in ascending order, each once."""
    lr = None if settings["lr"] is None else float(settings["lr"])
    return tuple(
        Schedule(
            step_count=step_count,
            beta2=schedule.beta2(step_count, settings["decay_rate"]),
            rho=schedule.rho(
                step_count,
                lr=lr,
                relative_step=settings["relative_step"],
                warmup_init=settings["warmup_init"],
            ),
        )
        for step_count in sorted(set(step_counts))
    )


# --- from knobs to settings -----------------------------------------------------------------------


def resolve(knobs: Mapping[str, Any], semantics: str) -> dict[str, Any]:
    """Turns knobs into settings. Pure; settings resolve to themselves.

    Args:
        knobs: by name; None or missing means what `semantics` says. Other names are ignored.
        semantics: "paper" or "torch".

    Returns:
        Every name of `KNOBS` with its value. Numbers are floats, but `lr` stays the tensor that it
        is, for schedulers write into it.

    Raises:
        InvalidSettings: a value has no meaning, or two contradict each other.
    """
    _choice("semantics", semantics, SEMANTICS)
    settings = {
        name: default if knobs.get(name) is None else _CHECKS[name](name, knobs[name])
        for name, default in SEMANTICS[semantics].items()
    }
    settings["eps"] = tuple(
        default if eps is None else eps
        for eps, default in zip(settings["eps"], SEMANTICS[semantics]["eps"], strict=True)
    )
    _refuse_contradictions(settings, semantics)
    return settings


def _refuse_contradictions(settings: Mapping[str, Any], semantics: str) -> None:
    """Raises where two settings cannot both be meant; the first two are also transformers'."""
    relative, lr = settings["relative_step"], settings["lr"]
    if semantics == "paper" and relative and lr is not None:
        raise _contradiction(
            "a relative step computes its own size",
            "Give relative_step=False to use lr, or leave lr out.",
            lr=lr,
            relative_step=relative,
            semantics=semantics,
        )
    if settings["warmup_init"] and not relative:
        raise _contradiction(
            "warm-up shapes the relative step",
            "Leave warmup_init out and warm up by a scheduler, or give relative_step=True.",
            warmup_init=True,
            relative_step=relative,
        )
    if settings["warmup_init"] and semantics == "torch":
        raise _contradiction(
            "there lr caps the relative step, and warm-up would replace it",
            "Leave warmup_init out and warm up by a scheduler, or give semantics='paper'.",
            warmup_init=True,
            semantics=semantics,
        )
    if not relative and lr is None:
        raise _contradiction(
            "a step that is not relative has no other size",
            "Give lr, or leave relative_step out.",
            relative_step=relative,
            lr=lr,
        )
    if settings["weight_decay_mode"] == "lr" and lr is None:
        raise _contradiction(
            "there is no lr to multiply with",
            "Give weight_decay_mode='alpha' or 'plain', or relative_step=False with lr.",
            weight_decay_mode="lr",
            lr=lr,
        )


# --- the meaning of single values -----------------------------------------------------------------


class _Range(NamedTuple):
    """Numbers that a knob can take: a test, and its words."""

    holds: Callable[[float], bool]
    words: str


_NOT_NEGATIVE = _Range(lambda number: 0 <= number < math.inf, "a number, 0 or more")
_RANGES = {
    "lr": _NOT_NEGATIVE,
    "clip_threshold": _Range(lambda number: number > 0, "a number above 0, float('inf') for off"),
    "decay_rate": _Range(lambda number: -math.inf < number <= 0, "a number, 0 or less, as -0.8"),
    "beta1": _Range(lambda number: 0 <= number < 1, "a number from 0 up to, not including, 1"),
    "weight_decay": _NOT_NEGATIVE,
}


def _is_number(value: object, allowed: _Range) -> TypeGuard[Real]:
    """Whether the value is a number in its range; True, "1e-3" and NaN are none."""
    return not isinstance(value, bool) and isinstance(value, Real) and allowed.holds(float(value))


def _number(name: str, value: object) -> float:
    if not _is_number(value, _RANGES[name]):
        raise _meaningless(name, value, _RANGES[name].words)
    return float(value)


def _number_or_tensor(name: str, value: object) -> float | Tensor:
    if not isinstance(value, Tensor):
        return _number(name, value)
    if value.numel() != 1:
        raise _meaningless(name, value, "a number, or a tensor of one element")
    _number(name, value.item())
    return value


def _eps(name: str, value: object) -> tuple[float | None, ...]:
    """eps1 and eps2, of which either may be left to the semantics."""
    words = "two numbers, (eps1, eps2), 0 or more"
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise _meaningless(name, value, words)
    if not all(eps is None or _is_number(eps, _NOT_NEGATIVE) for eps in value):
        raise _meaningless(name, value, words)
    return tuple(None if eps is None else float(eps) for eps in value)


def _choice(name: str, value: object, choices: Collection[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise _meaningless(name, value, " or ".join(map(repr, choices)))
    return value


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _meaningless(name, value, "a whole number, 1 or more")
    return value


def _yes_or_no(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _meaningless(name, value, "True or False")
    return value


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "lr": _number_or_tensor,
    "eps": _eps,
    "clip_threshold": _number,
    "decay_rate": _number,
    "beta1": _number,
    "weight_decay": _number,
    "scale_parameter": _yes_or_no,
    "relative_step": _yes_or_no,
    "warmup_init": _yes_or_no,
    "factored_axes": lambda name, value: _choice(name, value, FACTORED_AXES),
    "min_dim_size_to_factor": _whole_number,
    "weight_decay_mode": lambda name, value: _choice(name, value, WEIGHT_DECAY_MODES),
}


def _meaningless(name: str, value: object, allowed: str) -> InvalidSettings:
    return InvalidSettings(
        f"{name}={value!r} has no meaning here",
        remedy=f"Give {allowed}.",
        **{name: value},
    )


def _contradiction(why: str, remedy: str, **both: object) -> InvalidSettings:
    named = " and ".join(f"{name}={value!r}" for name, value in both.items())
    return InvalidSettings(f"{named} contradict each other: {why}", remedy=remedy, **both)
