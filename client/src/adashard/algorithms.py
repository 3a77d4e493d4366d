"""Adafactor as a worker sees it: its arguments, and what of them travels with a step.

`knobs` says what the arguments mean. Param groups hold settings, live: what a scheduler writes
into `param_groups[i]["lr"]` travels with the next push.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from adashard import knobs, schedule
from adashard.optimizer import RemoteOptimizer
from adashard.wire.messages import AdafactorStep, GroupStep, Schedule
from adashard.wire.spec import AdafactorLayout, Group


class Adafactor(RemoteOptimizer):
    """Adafactor whose weights and state live on shards.

    Takes the place of `transformers.Adafactor` or `torch.optim.Adafactor` in a training script.
    Every knob, which is all from `lr` to `step_offset`, may stand in a param group of its own; one
    left at None, there or here, means what `semantics` says:

    - `"paper"`: Adafactor as published, and transformers' defaults. The step is relative: it needs
      no learning rate, and refuses one unless `relative_step=False`.
    - `"torch"`: `torch.optim.Adafactor`. `lr` caps the relative step, eps1 is a lower bound
      instead of a summand, weight decay is multiplied with `lr`.
    - `"transformers-trainer"`: `optim="adafactor"` of transformers' Trainer. As "paper", but the
      step is `lr` = 5e-5, neither relative nor scaled. (Trainer clips at a norm of 1.0 besides:
      `max_grad_norm=1.0` does here.)
    - `"optax"`: `optax.adafactor`. As "paper", but the step is `lr` = 1.0 times the parameter's
      scale, the two largest axes are factored, from 128 up, and weight decay is plain.

    Args:
        params: tensors, groups, or named pairs as `model.named_parameters()` gives them.
        lr: learning rate, a number or a tensor of one element. paper: None, also in the param
            groups, so schedulers need `relative_step=False`; torch: 1e-2; transformers-trainer:
            5e-5; optax: 1.0. A relative step takes none but under "torch".
        eps: (eps1, eps2): regularisation of the squared gradient, and the least scale that a
            parameter counts with. (1e-30, 1e-3); torch: (1.19e-7, 1e-3).
        clip_threshold: RMS that updates are clipped to, 1.0; infinity clips nothing.
        decay_rate: the second moment keeps 1 - t^decay_rate of itself in step t; -0.8.
        beta1: decay of the first moment; None has none, and needs no memory for it.
        weight_decay: 0.0. What it is multiplied with, `weight_decay_mode` says.
        scale_parameter: whether the step is multiplied with the RMS of the parameter; True;
            transformers-trainer: False.
        relative_step: whether the step size falls with 1 / sqrt(t); True; transformers-trainer and
            optax: False. If not, it is `lr`.
        warmup_init: whether the relative step grows by 1e-6 a step at first; False. Not for torch.
        semantics: what knobs mean that are left out, and whether `lr` caps a relative step.
        eps_placement: eps1 is "added" to the squared gradient; torch: "clamped", it bounds
            mean(R) and sqrt(V) from below.
        factored_axes: "last_two"; optax: "largest_two" (as T5 does).
        min_dim_size_to_factor: both factored axes must be at least this long, otherwise the
            second moment is kept whole. 1; optax: 128.
        weight_decay_mode: weights shrink by weight_decay times "alpha" (the step size, with the
            parameter's scale; paper, transformers-trainer), times "lr" (torch), or by itself
            ("plain"; optax).
        step_offset: updates that the second moment counts as not taken, 0: beta2 is that of
            max(1, t - step_offset), the relative step's size that of t. Given the step count that
            a fine-tuning starts from, it forgets the squares of all training before, as
            `decay_offset` of optax and t5x does. Up to there only the latest squares count, where
            those two give NaN.
        max_grad_norm: largest norm of the whole gradient: over all parameters and shards, of the
            mean over workers. Longer ones are scaled down to it, which costs the shards one more
            exchange a step; None clips nothing.
        rounding: how weights become those of a reply below float32, "nearest" or "stochastic".
            The latter rounds up or down by chance, so that the mean is the shard's weight. That
            is float32: steps too small for a reply's format add up there with either.
        seed: of that chance, from 0 to 2**63 - 1; without effect on "nearest".
        reply_dtype: in which weights travel to the worker: "float32", "bfloat16" or "float16", or
            torch's; None is each parameter's own.
        wire_dtype: in which gradients travel to the shards: "float32", "bfloat16", "float16" or
            "int8", or torch's; None is each gradient's own, and so is one that is no narrower.
            Floats are rounded to nearest; what is too large becomes the largest finite number. With
            "int8" 1024 elements share a scale, and what rounding takes from a gradient is added to
            the worker's next one: a residual of 4 bytes for every element, which `state_dict` saves
            and a worker that joins anew has not; gradients that are sparse in rows travel in
            bfloat16. "auto" measures the first pushes, chooses int8 on a link of up to 2 Gbit/s,
            bfloat16 up to 12, neither where all shards are on this machine, and says so in the log:
            what a job comes to is not the same on another link then.
        keep_masters: where weights would come to the worker below float32, they come in float32,
            are kept so in the host's memory, and are rounded into the parameters. A shard that
            dies is then rebuilt without a changed bit; otherwise from rounded weights.
        recovery: what a shard that dies is rebuilt from: the "workers", which keep the optimizer
            state of the last step too (under 0.5 % of the weights' bytes), or the newest
            "checkpoint". "auto" is the former; with beta1, whose state is as large as the weights,
            the latter.
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
        eps_placement: str | None = None,
        factored_axes: str | None = None,
        min_dim_size_to_factor: int | None = None,
        weight_decay_mode: str | None = None,
        step_offset: int | None = None,
        max_grad_norm: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        reply_dtype: torch.dtype | str | None = None,
        wire_dtype: torch.dtype | str | None = None,
        keep_masters: bool = False,
        recovery: str = "auto",
        slice_bytes: int | None = None,
        address: str | None = None,
        job: str = "default",
        min_workers: int = 1,
        nonfinite: str = "reject",
        on_existing: str = "resume",
        token: str | None = None,
    ) -> None:
        job_settings = knobs.resolve_job_settings(
            max_grad_norm=max_grad_norm,
            rounding=rounding,
            seed=seed,
            reply_dtype=reply_dtype,
            wire_dtype=wire_dtype,
            keep_masters=keep_masters,
            recovery=recovery,
        )
        defaults = {
            "semantics": semantics,
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "eps_placement": eps_placement,
            "factored_axes": factored_axes,
            "min_dim_size_to_factor": min_dim_size_to_factor,
            "weight_decay_mode": weight_decay_mode,
            "step_offset": step_offset,
        }
        super().__init__(
            params,
            defaults,
            address=address,
            job=job,
            slice_bytes=slice_bytes,
            min_workers=min_workers,
            nonfinite=nonfinite,
            on_existing=on_existing,
            token=token,
            **job_settings,
        )

    def _resolve_group(self, group: dict[str, Any]) -> None:
        """Puts settings in the place of the group's knobs."""
        knobs.refuse_job_settings_in(group)
        group.update(knobs.resolve(group, group["semantics"]))

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
        factored_axes=knobs.FACTORED_AXES[group["factored_axes"]],
        min_dim_size_to_factor=group["min_dim_size_to_factor"],
        momentum=group["beta1"] is not None,
        eps_placement=knobs.EPS_PLACEMENTS[group["eps_placement"]],
    )


def settings_now(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a live param group for one step, checked again: schedulers write there.

    `lr` is None where the step does not use it, whatever a scheduler has written, as in
    transformers.

    Raises:
        InvalidSettings: a value that was written has no meaning.
    """
    group = dict(group)
    if not knobs.lr_counts(group, group["semantics"]):
        group["lr"] = None
    return knobs.resolve(group, group["semantics"])


def adafactor_step(settings: Mapping[str, Any]) -> AdafactorStep:
    """Hyper-parameters of one step, as they travel."""
    eps1, eps2 = settings["eps"]
    return AdafactorStep(
        eps1=eps1,
        eps2=eps2,
        clip_threshold=settings["clip_threshold"],
        beta1=settings["beta1"] or 0.0,
        weight_decay=settings["weight_decay"],
        weight_decay_mode=knobs.WEIGHT_DECAY_MODES[settings["weight_decay_mode"]],
        scale_parameter=settings["scale_parameter"],
        lr=float(settings["lr"] or 0.0),
    )


def schedules(settings: Mapping[str, Any], step_counts: Iterable[int]) -> tuple[Schedule, ...]:
    """beta2 and rho for every step count, in ascending order, each once."""
    lr = None if settings["lr"] is None else float(settings["lr"])
    return tuple(
        Schedule(
            step_count=step_count,
            beta2=schedule.beta2(step_count, settings["decay_rate"], settings["step_offset"]),
            rho=schedule.rho(
                step_count,
                lr=lr,
                relative_step=settings["relative_step"],
                warmup_init=settings["warmup_init"],
            ),
        )
        for step_count in sorted(set(step_counts))
    )
