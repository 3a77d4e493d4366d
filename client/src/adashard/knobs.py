"""What may be asked of Adafactor: what each word means, left out or not, and what contradicts.

A *knob* is a hyper-parameter as the user gives it; None means "what the semantics says". `resolve`
turns knobs into *settings*: every value stated, checked, and of one type. A *semantics* is one row
of a table and nothing else, except for whether a relative step is capped by `lr`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from adashard.wire.errors import InvalidSettings
from adashard.wire.spec import EpsPlacement, FactoredAxes, Group, Recovery, WeightDecayMode

FACTORED_AXES = {"last_two": FactoredAxes.LAST_TWO, "largest_two": FactoredAxes.LARGEST_TWO}
WEIGHT_DECAY_MODES = {
    "alpha": WeightDecayMode.ALPHA,
    "lr": WeightDecayMode.LR,
    "plain": WeightDecayMode.PLAIN,
}
EPS_PLACEMENTS = {"added": EpsPlacement.ADDED, "clamped": EpsPlacement.CLAMPED}
ROUNDINGS = ("nearest", "stochastic")
RECOVERIES = ("auto", "workers", "checkpoint")
REPLY_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
WIRE_DTYPES = {**REPLY_DTYPES, "int8": torch.int8}
AUTO = "auto"
SEED_LIMIT = 1 << 63
"""Seeds are below this: they travel as signed numbers of 64 bits."""

# --- what a knob means that is left out -----------------------------------------------------------

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
    "eps_placement": "added",
    "factored_axes": "last_two",
    "min_dim_size_to_factor": 1,
    "weight_decay_mode": "alpha",
    "step_offset": 0,
}
_TORCH = {
    **_PAPER,
    "lr": 1e-2,
    # torch takes it from the parameter's dtype; weights on a shard are float32 whatever that is.
    "eps": (torch.finfo(torch.float32).eps, 1e-3),
    "eps_placement": "clamped",
    "weight_decay_mode": "lr",
}
_TRANSFORMERS_TRAINER = {
    **_PAPER,
    "lr": 5e-5,
    "scale_parameter": False,
    "relative_step": False,
}
_OPTAX = {
    **_PAPER,
    "lr": 1.0,  # learning_rate=None leaves the factor out
    "relative_step": False,
    "factored_axes": "largest_two",
    "min_dim_size_to_factor": 128,
    "weight_decay_mode": "plain",
}
SEMANTICS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": _PAPER,
        "torch": _TORCH,
        "transformers-trainer": _TRANSFORMERS_TRAINER,
        "optax": _OPTAX,
    }
)
"""What each knob means when it is left at None.

References:
    paper: Shazeer and Stern, 2018, Algorithm 6, and the defaults of `transformers.Adafactor`.
    torch: the defaults of `torch.optim.Adafactor`.
    transformers-trainer: what `transformers.Trainer` builds of `optim="adafactor"`.
    optax: the defaults of `optax.adafactor` 0.2.8.
"""

KNOBS = tuple(_PAPER)
"""Names of all knobs, in the order of the constructor."""

JOB_SETTINGS = (
    "max_grad_norm",
    "rounding",
    "seed",
    "reply_dtype",
    "wire_dtype",
    "keep_masters",
    "recovery",
)
"""Names of the settings that hold for a whole job, and not for a group."""

_LR_CAPS_A_RELATIVE_STEP = ("torch",)


def lr_counts(settings: Mapping[str, Any], semantics: str) -> bool:
    """Whether `lr` takes part in a step: always, unless that is relative and has its own cap."""
    return not settings["relative_step"] or semantics in _LR_CAPS_A_RELATIVE_STEP


def resolve(knobs: Mapping[str, Any], semantics: str) -> dict[str, Any]:
    """Turns knobs into settings. Pure; settings resolve to themselves.

    Args:
        knobs: by name; None or missing means what `semantics` says. Other names are ignored.
        semantics: a row of `SEMANTICS`.

    Returns:
        Every name of `KNOBS` with its value. Numbers are floats, but `lr` stays the tensor that it
        is, for schedulers write into it; it is None where a relative step leaves it no part.

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
    if knobs.get("lr") is None and not lr_counts(settings, semantics):
        settings["lr"] = None
    _refuse_contradictory_steps(settings, semantics)
    _refuse_what_lacks_its_other(settings)
    return settings


# --- what contradicts -----------------------------------------------------------------------------


def _refuse_contradictory_steps(settings: Mapping[str, Any], semantics: str) -> None:
    """Raises where the size of a step is told in two ways; transformers refuses the first two."""
    relative, lr = settings["relative_step"], settings["lr"]
    if lr is not None and not lr_counts(settings, semantics):
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
            semantics=semantics,
        )
    if settings["warmup_init"] and semantics in _LR_CAPS_A_RELATIVE_STEP:
        raise _contradiction(
            "there lr caps the relative step, and warm-up would replace it",
            "Leave warmup_init out and warm up by a scheduler, or give semantics='paper'.",
            warmup_init=True,
            semantics=semantics,
        )


def _refuse_what_lacks_its_other(settings: Mapping[str, Any]) -> None:
    """Raises where a setting needs another one that is not there."""
    relative, lr, eps = settings["relative_step"], settings["lr"], settings["eps"]
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
    if settings["eps_placement"] == "clamped" and eps[0] == 0:
        raise _contradiction(
            "a lower bound of 0 bounds nothing",
            "Give eps1 above 0, or eps_placement='added'.",
            eps=eps,
            eps_placement="clamped",
        )


def resolve_job_settings(
    *,
    max_grad_norm: object,
    rounding: object,
    seed: object,
    reply_dtype: object,
    wire_dtype: object,
    keep_masters: object,
    recovery: object,
) -> dict[str, Any]:
    """Checks the settings that hold for a whole job. Pure.

    Returns:
        Every name of `JOB_SETTINGS` with its value, of one type or None: `reply_dtype` is torch's,
        `wire_dtype` a word.

    Raises:
        InvalidSettings: a value has no meaning, or two contradict each other.
    """
    if max_grad_norm is not None:
        max_grad_norm = _number("max_grad_norm", max_grad_norm)
    reply = _format("reply_dtype", reply_dtype, REPLY_DTYPES)
    wire = AUTO if wire_dtype == AUTO else _format("wire_dtype", wire_dtype, WIRE_DTYPES)
    if rounding == "stochastic" and reply == "float32":
        raise _contradiction(
            "float32 replies are not rounded, and a worker of less would round them to nearest",
            "Leave reply_dtype out, or give rounding='nearest'.",
            rounding=rounding,
            reply_dtype=reply_dtype,
        )
    if rounding == "stochastic" and keep_masters is True:
        raise _contradiction(
            "masters are rounded by the worker, and to nearest",
            "Leave keep_masters out, or give rounding='nearest'.",
            rounding=rounding,
            keep_masters=keep_masters,
        )
    return {
        "max_grad_norm": max_grad_norm,
        "rounding": _choice("rounding", rounding, ROUNDINGS),
        "seed": _whole_number("seed", seed),
        "reply_dtype": reply and REPLY_DTYPES[reply],
        "wire_dtype": wire,
        "keep_masters": _yes_or_no("keep_masters", keep_masters),
        "recovery": _choice("recovery", recovery, RECOVERIES),
    }


def recovery_of(choice: str, groups: Sequence[Group]) -> Recovery:
    """Where the state of a dead shard is to come from: decided by settings, never by shapes.

    Args:
        choice: one of `RECOVERIES`.
        groups: what the state of each group of the job consists of.

    Raises:
        InvalidSettings: workers would have to keep state that they do not keep.
    """
    large = [index for index, one in enumerate(groups) if one.adafactor and one.adafactor.momentum]
    if choice == "workers" and large:
        raise InvalidSettings(
            f"recovery='workers' and beta1 in group {large[0]} contradict each other: a first "
            "moment is as large as the weights, and no worker keeps it",
            remedy="Leave beta1 out, or give recovery='checkpoint'.",
            recovery=choice,
        )
    if choice == "checkpoint" or large:
        return Recovery.CHECKPOINT
    return Recovery.WORKERS


def refuse_job_settings_in(group: Mapping[str, Any]) -> None:
    """Refuses a param group that states what holds for a whole job: it would be ignored.

    Raises:
        InvalidSettings: the group has one of `JOB_SETTINGS`.
    """
    for name in JOB_SETTINGS:
        if name in group:
            raise InvalidSettings(
                f"{name}={group[name]!r} stands in a param group, but holds for the whole job",
                remedy=f"Give {name} to the optimizer.",
                **{name: group[name]},
            )


# --- the meaning of single values -----------------------------------------------------------------


class _Range(NamedTuple):
    """Numbers that a setting can take: a test, and its words."""

    holds: Callable[[float], bool]
    words: str


_NOT_NEGATIVE = _Range(lambda number: 0 <= number < math.inf, "a number, 0 or more")
_RANGES = {
    "lr": _NOT_NEGATIVE,
    "clip_threshold": _Range(lambda number: number > 0, "a number above 0, float('inf') for off"),
    "decay_rate": _Range(lambda number: -math.inf < number <= 0, "a number, 0 or less, as -0.8"),
    "beta1": _Range(lambda number: 0 <= number < 1, "a number from 0 up to, not including, 1"),
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _Range(lambda number: 0 < number < math.inf, "a number above 0, None for off"),
}
_WHOLE_RANGES = {
    "min_dim_size_to_factor": _Range(lambda number: number >= 1, "a whole number, 1 or more"),
    "step_offset": _Range(lambda number: number >= 0, "a whole number, 0 or more"),
    "seed": _Range(lambda number: 0 <= number < SEED_LIMIT, "a whole number, 0 up to 2**63 - 1"),
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


def _whole_number(name: str, value: object) -> int:
    allowed = _WHOLE_RANGES[name]
    if isinstance(value, bool) or not isinstance(value, Integral) or not allowed.holds(int(value)):
        raise _meaningless(name, value, allowed.words)
    return int(value)


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
        raise _meaningless(name, value, _either(choices))
    return value


def _format(name: str, value: object, formats: Mapping[str, torch.dtype]) -> str | None:
    """The name of a number format, given by that or as torch's; None for none."""
    for word, dtype in formats.items():
        if value is dtype or (isinstance(value, str) and value == word):
            return word
    if value is not None:
        also = (AUTO,) if name == "wire_dtype" else ()
        raise _meaningless(name, value, _either((*formats, *also, None)))
    return None


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
    "eps_placement": lambda name, value: _choice(name, value, EPS_PLACEMENTS),
    "factored_axes": lambda name, value: _choice(name, value, FACTORED_AXES),
    "min_dim_size_to_factor": _whole_number,
    "weight_decay_mode": lambda name, value: _choice(name, value, WEIGHT_DECAY_MODES),
    "step_offset": _whole_number,
}


def _either(choices: Collection[object]) -> str:
    return " or ".join(map(repr, choices))


def _meaningless(name: str, value: object, allowed: str) -> InvalidSettings:
    return InvalidSettings(
        f"{name}={value!r} has no meaning here",
        remedy=f"Give {allowed}.",
        **{name: value},
    )


def _contradiction(why: str, remedy: str, **both: object) -> InvalidSettings:
    named = " and ".join(f"{name}={value!r}" for name, value in both.items())
    return InvalidSettings(f"{named} contradict each other: {why}", remedy=remedy, **both)
