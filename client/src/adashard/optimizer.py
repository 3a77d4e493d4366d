"""A torch optimizer whose weights and state live on a server.

To a training script it is a `torch.optim.Optimizer` like any other: groups, hooks, schedulers,
closures. It knows no network: a `Session` takes its steps.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Collection
from functools import cache
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from adashard import state_dict as layouts
from adashard.address import coordinator_address
from adashard.gradient_format import GradientFormat
from adashard.gradients import gathered, listed, not_finite, refusal
from adashard.knobs import recovery_of
from adashard.omissions import Omissions
from adashard.push import Push, Replies
from adashard.session import Session
from adashard.state import State, fitted
from adashard.transport.grpc import GrpcTransport
from adashard.wire.control import OnExisting
from adashard.wire.errors import (
    AdashardError,
    InvalidSettings,
    JobExists,
    LeaseExpired,
    UnsupportedParameter,
)
from adashard.wire.messages import GroupStep
from adashard.wire.placement import CLUSTER_DEFAULT, validate_spec
from adashard.wire.spec import Group, JobSpec, Parameter, Rounding
from adashard.wire.tensors import wire_dtype

log = logging.getLogger("adashard")


class RemoteOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that a server runs; see `Adafactor` for the arguments.

    A subclass says what its groups mean: `_resolve_group`, `_layout`, `_group_step`.

    It connects at the first `step()`. One thread at a time may use it.
    """

    def __init__(
        self,
        params: Any,  # noqa: ANN401 - torch's own: tensors, groups or named pairs
        defaults: dict[str, Any],
        *,
        address: str | None,
        job: str,
        slice_bytes: int | None,
        min_workers: int,
        nonfinite: str,
        on_existing: str,
        token: str | None,
        max_grad_norm: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        reply_dtype: torch.dtype | None = None,
        wire_dtype: str | None = None,
        keep_masters: bool = False,
        recovery: str = "auto",
    ) -> None:
        if nonfinite not in ("reject", "skip"):
            raise InvalidSettings(f"nonfinite={nonfinite!r}: choose 'reject' or 'skip'")
        self._on_existing = _on_existing(on_existing)
        self._address = coordinator_address(address)
        self._token = token if token is not None else os.environ.get("ADASHARD_TOKEN", "")
        self._job, self._nonfinite = job, nonfinite
        self._slice_bytes = CLUSTER_DEFAULT if slice_bytes is None else slice_bytes
        self._min_workers = min_workers
        self._max_grad_norm = max_grad_norm
        self._replies = Replies(
            dtype=reply_dtype,
            rounding=Rounding[rounding.upper()],
            seed=seed,
            keep_masters=keep_masters,
        )
        self._format = GradientFormat(wire_dtype)
        self._recovery = recovery
        self._session: Session | None = None
        self._loaded: State | None = None  # until the job has taken a step from it
        self._stepped = False
        self._omissions = Omissions()
        self._logged: dict[str, float] = {}
        super().__init__(params, defaults)
        validate_spec(self._spec())

    # --- what a training loop calls -------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 - as in torch
        """Pushes the gradients, waits for the round, and writes the fresh weights in place.

        A parameter whose `grad` is None takes no part; one whose gradient is zero does. The call
        returns when all parameters hold the job's next version, or, for a worker that joins a
        job with other weights than its own, when it has adopted them.

        Args:
            closure: evaluates the model first and returns the loss.

        Returns:
            What `closure` returned.

        Raises:
            NotFinite: a gradient has NaN or Inf in it, under `nonfinite="reject"`; nothing was
                sent, and the next call goes on.
            InvalidGradient: one is sparse in another way than in rows that the parameter has;
                nothing was sent.
            CannotReachServer: nobody answers at the address.
            ModelMismatch: the job was registered with another model.
            JobLost: state of the job is gone with a shard.
            Evicted: the job goes on without this worker; the message says why.
            AdashardError: the other classes of the catalogue; the next call joins anew.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._parameters()
        self._push(parameters, *self._gradients(parameters))
        return loss

    @torch.no_grad()
    def skip_step(self) -> None:
        """Takes part in the job's next step without a gradient, so that nobody waits for one.

        For a loop that has no use for its gradients, as after an overflow under loss scaling
        (`adashard.GradScaler` calls it by itself). In the mean this worker's gradient counts as
        zero; where no other has one, the weights stay. As `step()` it returns with the fresh
        weights, so call it where that would have been called.

        Raises:
            AdashardError: as `step()` does.
        """
        self._push(self._parameters(), {}, ())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, as torch's; warns where steps are left out again and again."""
        if any(one.grad is not None for group in self.param_groups for one in group["params"]):
            self._omissions.dropped(self._job)
        super().zero_grad(set_to_none)

    @property
    def global_step(self) -> int:
        """Steps that the job has taken, as far as this worker holds its weights; 0 before."""
        return max(self._session.version, 0) if self._session else 0

    @property
    def worker_rank(self) -> int | None:
        """This worker's rank in the job; None before its first step."""
        return self._session.rank if self._session else None

    def log(self, **values: float | Tensor) -> None:
        """Shows values such as `loss=` beside the step just taken, on the page and in REST.

        Args:
            **values: numbers or tensors of one element; detached and copied.
        """
        for name, value in values.items():
            self._logged[name] = float(value.detach() if isinstance(value, Tensor) else value)
        if self._session is not None:
            self._flush_log(self._session)

    def close(self) -> None:
        """Leaves the job, which stays; waits at most 10 s for the others' blessing. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- what torch calls -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group before the first step; settings left out are the optimizer's.

        Raises:
            InvalidSettings: the job has begun, or the group's settings contradict each other.
            UnsupportedParameter: a parameter is not floating point, or is sparse.
        """
        if self._session is not None:
            raise InvalidSettings(
                f"job {self._job!r} has begun: its parameters are fixed",
                remedy="Give all groups to the constructor, frozen ones too: those without "
                "gradients take no part.",
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for parameter in group["params"]:
                _check_parameter(parameter)
            self._resolve_group(group)
        except AdashardError:
            self.param_groups.pop()
            raise

    def state_dict(self, *, to_transformers: bool = False) -> dict[str, Any]:
        """The whole optimizer state of the job at the last step, fetched from all shards.

        It is laid out as that of `torch.optim.Adafactor`, and loads there: second moments in
        float32 under `row_var`, `col_var` or `variance`, `exp_avg` with beta1, torch's settings of
        a group beside ours. What torch has no word for stands under the key "remote": job, version
        and, where weights come to the worker below float32, the float32 ones ("masters"); and what
        `wire_dtype` has left to be sent of this worker's gradients ("wire"). Before the first step
        it is what was loaded. No other worker is kept waiting; of several, one saves for all,
        unless each is to keep what it has left to send.

        Args:
            to_transformers: whether the layout is that of `transformers.Adafactor` instead.

        Returns:
            A dict that `torch.load(..., weights_only=True)` reads; its tensors are on the CPU.

        Raises:
            LeaseExpired: the worker has left the job, and cannot ask for its state any more.
            AdashardError: a shard has not answered within its budget.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self._session.state() if self._session else self._loaded
        if state is None and self._stepped:
            raise LeaseExpired(
                f"the state of job {self._job!r} is on its shards, and this worker is not part of "
                "the job any more",
                remedy="Call state_dict() before close(); or step(), which joins again.",
            )
        weights = [tensor for _, tensor, _ in self._parameters()]
        found = layouts.pack(
            state,
            self._spec(),
            weights,
            self.param_groups,
            job=self._job,
            to_transformers=to_transformers,
            wire=self._format.saved(weights),
        )
        for after in self._optimizer_state_dict_post_hooks.values():
            found = after(self, found) or found
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the settings of a dict, and begins a job with its optimizer state.

        Before the first step this worker begins the job at the version of the dict, with its
        parameters as they are, or with the masters in the dict where its weights are what these
        round to. Several workers may load the same dict: one begins, the others join. In a job
        that is under way there is nothing to load: the same state is taken silently.

        Args:
            state_dict: of this class, of `torch.optim.Adafactor` or of `transformers.Adafactor`.
                It is not changed; the optimizer may keep its tensors.

        Raises:
            ModelMismatch: it is of another model; the first tensor that differs, and both shapes.
            InvalidRequest: it has numbers in it that no optimizer can have come to.
            InvalidSettings: its settings contradict each other.
            JobExists: the job is under way with another state. With `on_existing="replace"` this
                worker leaves it, and the next step begins it anew.
        """
        saved = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            saved = before(self, saved) or saved
        groups = layouts.merged_groups(self.param_groups, saved)
        for group in groups:
            self._resolve_group(group)
        loaded = layouts.unpack(saved, self._spec_of(groups))
        if self._session is not None:
            self._compare(self._session, loaded)
        if self._session is None:
            self._loaded, self._stepped = loaded, False
            self._format.load(**layouts.unpack_wire(saved, self._spec_of(groups)))
        self.param_groups = groups
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the session: a copy joins by itself, under an identity of its own."""
        return {**self.__dict__, "_session": None}

    # --- what a subclass says -------------------------------------------------------------------

    def _resolve_group(self, group: dict[str, Any]) -> None:
        """Fills in and checks the settings of a group, in place."""
        raise NotImplementedError

    def _layout(self, group: dict[str, Any]) -> Group:
        """What of a group is fixed for the job's life."""
        raise NotImplementedError

    def _group_step(self, group: dict[str, Any], step_counts: Collection[int]) -> GroupStep:
        """A group's settings for one step, with scalars for each of `step_counts`."""
        raise NotImplementedError

    # --- inside ---------------------------------------------------------------------------------

    def _parameters(self) -> list[tuple[str, Tensor, int]]:
        """Name, tensor and group of every parameter, in registration order."""
        found = []
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for index, parameter in enumerate(group["params"]):
                name = names[index] if names is not None else f"{number}.{index}"
                found.append((name, parameter, number))
        return found

    def _spec(self) -> JobSpec:
        return self._spec_of(self.param_groups)

    def _spec_of(self, groups: list[dict[str, Any]]) -> JobSpec:
        """The job of this optimizer's parameters, with the settings of `groups`."""
        fixed = tuple(self._layout(group) for group in groups)
        return JobSpec(
            parameters=tuple(
                Parameter(name=name, shape=tuple(tensor.shape), group=group)
                for name, tensor, group in self._parameters()
            ),
            groups=fixed,
            recovery=recovery_of(self._recovery, fixed),
            slice_bytes=self._slice_bytes,
            min_workers=self._min_workers,
        )

    def _gradients(
        self, parameters: list[tuple[str, Tensor, int]]
    ) -> tuple[dict[int, Tensor], tuple[int, ...]]:
        """The gradients to push, by parameter; none where some are not finite, and which.

        Raises:
            NotFinite: some are not finite, under `nonfinite="reject"`.
            InvalidGradient: one is sparse in more than rows, or has a row that the parameter has
                not.
        """
        found = gathered((name, tensor) for name, tensor, _ in parameters)
        broken = not_finite(found)
        if not broken:
            return found, ()
        culprits = [parameters[index][0] for index in broken]
        if self._nonfinite == "reject":
            worker = self._session.id if self._session else "not yet joined"
            raise refusal(culprits, worker=worker, step=self.global_step + 1, job=self._job)
        log.warning(
            "job %r: step %d is skipped: NaN or Inf in the gradient of %s",
            self._job,
            self.global_step + 1,
            listed(culprits),
        )
        return {}, broken

    def _push(
        self,
        parameters: list[tuple[str, Tensor, int]],
        gradients: dict[int, Tensor],
        broken: tuple[int, ...],
    ) -> None:
        """Takes one step with these gradients; `broken` names those that are not finite."""
        session = self._joined(parameters)
        self._check_layouts(session.spec)
        encoding = self._format.begin()
        try:
            push = Push(
                gradients=gradients,
                not_finite=broken,
                settings=cache(self._settings),  # a repeated push says the same
                max_grad_norm=self._max_grad_norm,
                encoding=encoding,
            )
            used = session.step(push)
            if not used:
                log.info(
                    "job %r: adopted the weights of step %d; this worker's first gradient was "
                    "computed on others and is dropped",
                    self._job,
                    session.version,
                )
        except BaseException:
            self._session = None
            session.abandon()
            raise
        self._format.end(encoding, gradients, used=used and session.applied, job=self._job)
        self._loaded, self._stepped = None, True
        self._omissions.stepped()
        self._flush_log(session)

    def _joined(self, parameters: list[tuple[str, Tensor, int]]) -> Session:
        if self._session is None:
            spec = self._spec()
            validate_spec(spec)
            tensors = [tensor for _, tensor, _ in parameters]
            if self._loaded is not None:
                self._loaded = fitted(self._loaded, spec, tensors, self._replies)
            else:
                self._format.forget()
            self._session = Session(
                GrpcTransport(),
                self._address,
                self._job,
                spec,
                tensors,
                on_existing=self._on_existing,
                token=self._token,
                replies=self._replies,
                loaded=self._loaded,
            )
            # A script that ends, or forgets the optimizer, must not leave the others waiting.
            weakref.finalize(self, self._session.abandon)
        return self._session

    def _compare(self, session: Session, loaded: State | None) -> None:
        """Leaves a job that has another state, if it may be replaced.

        Raises:
            JobExists: it may not.
        """
        here = session.state()
        there = loaded.fingerprint() if loaded else None
        if here.version == (loaded.version if loaded else 0) and there in (
            None,
            here.fingerprint(),
        ):
            return
        if self._on_existing is not OnExisting.REPLACE:
            raise JobExists(
                f"job {self._job!r} is at step {here.version}, and its optimizer state is not the "
                f"one of step {loaded.version if loaded else 0} in the state dict",
                remedy="Load it before the first step() of a new job=, or into an optimizer with "
                "on_existing='replace'.",
                job=self._job,
            )
        self.close()

    def _check_layouts(self, spec: JobSpec) -> None:
        """Refuses what a scheduler or a user has changed and no shard could follow."""
        for number, (group, fixed) in enumerate(zip(self.param_groups, spec.groups, strict=True)):
            if self._layout(group) != fixed:
                raise InvalidSettings(
                    f"group {number} was registered as {fixed} and is {self._layout(group)} now: "
                    "what its state consists of is fixed for the job's life",
                    remedy="Set it back, or begin another job=.",
                )

    def _settings(self, step_counts: tuple[int, ...]) -> tuple[GroupStep, ...]:
        """The settings of every group for a step after which counts may have grown by one."""
        counts: list[set[int]] = [set() for _ in self.param_groups]
        for (_, _, group), count in zip(self._parameters(), step_counts, strict=True):
            counts[group].add(count + 1)
        return tuple(
            self._group_step(group, sorted(counts[number]))
            for number, group in enumerate(self.param_groups)
        )

    def _flush_log(self, session: Session) -> None:
        if self._logged:
            values, self._logged = self._logged, {}
            session.log(values)


def _check_parameter(parameter: Tensor) -> None:
    if parameter.layout is not torch.strided:
        raise UnsupportedParameter(f"a {parameter.layout} parameter cannot be trained")
    wire_dtype(parameter.dtype)


def _on_existing(choice: str) -> OnExisting:
    try:
        return {
            "resume": OnExisting.RESUME,
            "replace": OnExisting.REPLACE,
            "error": OnExisting.ERROR,
        }[choice]
    except KeyError:
        raise InvalidSettings(
            f"on_existing={choice!r}: choose 'resume', 'replace' or 'error'"
        ) from None
