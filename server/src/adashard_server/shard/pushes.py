"""What a push must say so that every shard can form the same record and apply it."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from adashard.wire.errors import InvalidRequest
from adashard.wire.messages import Begin, GroupStep
from adashard.wire.spec import DType, JobSpec, Rounding, WeightDecayMode


def check_push(begin: Begin, spec: JobSpec, step_counts: Sequence[int]) -> None:
    """Refuses a push whose record could not be applied.

    Args:
        begin: the push.
        spec: the job.
        step_counts: each parameter's count of updates before the step.

    Raises:
        InvalidRequest: with what it lacks.
    """
    if len(begin.present) != (len(spec.parameters) + 7) // 8:
        raise InvalidRequest(f"a push has a presence bit for each of {len(spec.parameters)}")
    _check_not_finite(begin, len(spec.parameters))
    if begin.sparse and len(begin.sparse) != len(begin.present):
        raise InvalidRequest("a push says of all parameters or of none whether rows are sparse")
    if not (isfinite(begin.max_grad_norm) and begin.max_grad_norm >= 0):
        raise InvalidRequest(f"max_grad_norm is 0 or more and finite, not {begin.max_grad_norm}")
    if not (isfinite(begin.share) and begin.share > 0):
        raise InvalidRequest(f"a share is positive and finite, not {begin.share}")
    if len(begin.groups) != len(spec.groups):
        raise InvalidRequest(f"a push has settings for each of {len(spec.groups)} groups")
    needed: dict[int, set[int]] = {}
    for parameter, count in zip(spec.parameters, step_counts, strict=True):
        needed.setdefault(parameter.group, set()).add(count + 1)
    for group, step in enumerate(begin.groups):
        _check_group(step, needed.get(group, set()))


def check_formats(begin: Begin, spec: JobSpec) -> None:
    """Refuses a push or pull that does not say how weights are to come back.

    Raises:
        InvalidRequest: with what it lacks.
    """
    if len(begin.dtypes) not in (1, len(spec.parameters)) or {DType.UNSPECIFIED, DType.INT8} & set(
        begin.dtypes
    ):
        raise InvalidRequest(
            f"weights are wanted in one format or in one each of {len(spec.parameters)}, "
            f"not in {len(begin.dtypes)}"
        )
    if begin.rounding is Rounding.UNSPECIFIED:
        raise InvalidRequest("a push or pull says how weights are rounded")


_OF_A_GRADIENT = ("present", "not_finite", "share", "sparse", "groups", "max_grad_norm")


def check_same(begin: Begin, known: Begin | None) -> None:
    """Refuses a repeated push that is another one: (worker, step) names one gradient for ever.

    Args:
        begin: the push.
        known: what the worker has begun before for this step, if anything.

    Raises:
        InvalidRequest: a part of the first may be in the sums already.
    """
    if known is not None and any(
        getattr(begin, name) != getattr(known, name) for name in _OF_A_GRADIENT
    ):
        raise InvalidRequest(f"worker {begin.sender} pushes another gradient for step {begin.step}")


def _check_not_finite(begin: Begin, parameter_count: int) -> None:
    """Refuses parameters that there are not, or of which something is sent all the same."""
    named = begin.not_finite
    if not named:
        return
    if list(named) != sorted(set(named)) or not 0 <= named[0] <= named[-1] < parameter_count:
        raise InvalidRequest(
            f"gradients that are not finite are named once each, ascending, by parameters below "
            f"{parameter_count}"
        )
    if any(begin.present):
        raise InvalidRequest("a push with gradients that are not finite sends none")


def _check_group(step: GroupStep, counts: set[int]) -> None:
    settings = step.adafactor
    if settings is None:
        raise InvalidRequest("a push has settings of the job's optimizer for each group")
    if settings.weight_decay_mode is WeightDecayMode.UNSPECIFIED:
        raise InvalidRequest("a push says what weight decay is multiplied with")
    if missing := counts - {schedule.step_count for schedule in step.schedules}:
        raise InvalidRequest(f"a push lacks beta2 and rho for step counts {sorted(missing)[:3]}")
    numbers = [number for one in step.schedules for number in (one.beta2, one.rho)]
    numbers += [settings.eps1, settings.eps2, settings.beta1, settings.weight_decay, settings.lr]
    if not all(isfinite(number) for number in numbers) or not settings.clip_threshold > 0:
        raise InvalidRequest(f"hyper-parameters must be finite numbers: {settings}")
