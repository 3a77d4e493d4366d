"""Golden trajectories: recorded gradients, and the weights and state that they must lead to.

`data/index.json` spells out what each configuration means and how far a result may be off. The
standard is "ref", a float64 computation written from the paper; what transformers, torch and optax
made of the same gradients in float32 is stored beside it and serves to measure the tolerance.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = pathlib.Path(__file__).parent / "data"
INDEX: Mapping[str, Any] = json.loads((DATA / "index.json").read_text())
TENSORS: tuple[str, ...] = tuple(INDEX["tensors"])
STATE_KINDS = {"row": "row", "col": "column", "v": "full", "m": "momentum"}
"""Kinds of state in the files, and what `optim.adafactor.State` calls them."""


@dataclass(frozen=True)
class Config:
    """One configuration: the gradients it is fed and where they must lead.

    Steps count from 1. All tensors come out fresh, in float64 unless said otherwise.
    """

    name: str

    @property
    def semantics(self) -> Mapping[str, Any]:
        return INDEX["configs"][self.name]["semantics"]

    @property
    def saved_steps(self) -> tuple[int, ...]:
        return tuple(INDEX["configs"][self.name].get("saved_steps", INDEX["saved_steps"]))

    @property
    def last_step(self) -> int:
        return self.saved_steps[-1]

    @property
    def is_bf16(self) -> bool:
        return self.semantics["dtype"] == "bf16"

    def start(self, tensor: str) -> Tensor:
        """The initial weight; bf16 configurations begin with it rounded."""
        return self.rounded(_load("inputs")[f"x0/{tensor}"].double())

    def worker_gradients(self, tensor: str, step: int) -> Tensor:
        """The gradients of all workers at one step, along a new first axis."""
        if self.name == "accumulate_w3":
            return _load("inputs")[f"worker_grad/{tensor}"][step - 1].double()
        return self.rounded(_load("inputs")[f"grad/{tensor}"][step - 1].double()).unsqueeze(0)

    def gradient(self, tensor: str, step: int) -> Tensor:
        """The gradient of one step: the mean over workers."""
        return self.worker_gradients(tensor, step).mean(dim=0)

    def rounded(self, weight: Tensor) -> Tensor:
        """The weight as it is between two steps: rounded in bf16 configurations."""
        return weight.bfloat16().to(weight.dtype) if self.is_bf16 else weight

    def expected(self, tensor: str, kind: str, step: int, *, by: str = "ref") -> Tensor | None:
        """The weight (kind "x") or state ("row", "col", "v", "m") after a step, where stored."""
        found = _load(self.name).get(f"{by}/{tensor}/{kind}@{step}")
        if found is None:
            return None
        if not INDEX["tensors"][tensor]["shape"]:
            found = found.squeeze()
        return found.to(torch.float64, copy=True)

    def kinds(self, tensor: str, step: int) -> list[str]:
        """Kinds that are stored for a tensor after a step."""
        return [kind for kind in ("x", *STATE_KINDS) if self.stores(tensor, kind, step)]

    def stores(self, tensor: str, kind: str, step: int) -> bool:
        return f"ref/{tensor}/{kind}@{step}" in _load(self.name)

    def allowed(self, tensor: str, kind: str, step: int) -> float:
        """Largest difference to the standard that rounding in float32 explains."""
        standard = self.expected(tensor, kind, step)
        assert standard is not None
        largest = float(standard.abs().max())
        if kind != "x":
            return 1e-4 * largest + 1e-38
        if self.is_bf16:
            return INDEX["tolerance"]["bf16"]["ulps"] * 2.0**-8 * largest
        rule = INDEX["tolerance"]["f32"]
        change = float((standard - self.start(tensor)).square().mean().sqrt())
        return rule["rel"] * change + rule["ulps"] * step * 2.0**-24 * largest

    def share_of_tolerance(self, tensor: str, kind: str, step: int, found: Tensor) -> float:
        """How much of the tolerance a result uses up: above 1 is wrong, and so is NaN."""
        standard = self.expected(tensor, kind, step)
        assert standard is not None
        assert found.shape == standard.shape, (self.name, tensor, kind, found.shape)
        error = float((found.double() - standard).abs().max())
        allowed = self.allowed(tensor, kind, step)
        return error / allowed if error else 0.0

    def differences(self, results: Mapping[tuple[str, str, int], Tensor]) -> list[str]:
        """One line for each result, named (tensor, kind, step), that is not within tolerance."""
        shares = {key: self.share_of_tolerance(*key, found) for key, found in results.items()}
        return [
            f"{self.name}: {kind} of {tensor} at step {step} is off by {share:.3g} tolerances"
            for (tensor, kind, step), share in shares.items()
            if not share <= 1
        ]

    def knobs(self) -> dict[str, Any]:
        """The configuration as keyword arguments of `adashard.Adafactor`."""
        meant = self.semantics
        by_optax = meant["factor"] == "largest2"
        return {
            "semantics": "torch" if meant["rho"] == "torch" else "optax" if by_optax else "paper",
            "lr": meant["lr"],
            "eps": (meant["eps1"], meant["eps2"]),
            "eps_placement": {"paper": "added", "torch": "clamped"}[meant["eps_mode"]],
            "clip_threshold": meant["d"],
            "decay_rate": -meant["c"],
            "beta1": meant["beta1"],
            "weight_decay": meant["wd"],
            "weight_decay_mode": meant["wd_mode"],
            "scale_parameter": meant["scale_parameter"],
            "relative_step": meant["rho"] != "const",
            "warmup_init": meant["rho"] == "warmup",
            "factored_axes": "largest_two" if by_optax else "last_two",
            "min_dim_size_to_factor": meant["min_dim"],
        }


CONFIGS: Mapping[str, Config] = {name: Config(name) for name in INDEX["configs"]}
RESUMED: tuple[str, ...] = tuple(INDEX["resume"]["configs"])
RESUME_STEP: int = INDEX["resume"]["step"]


def recorded_digests() -> dict[str, str]:
    """SHA-256 of each data file, as the index has it."""
    entries = [INDEX["inputs"], *INDEX["configs"].values()]
    return {entry["file"]: entry["sha256"] for entry in entries}


def digest(file: str) -> str:
    """SHA-256 of a data file as it is."""
    return hashlib.sha256((DATA / file).read_bytes()).hexdigest()


@functools.cache
def _load(name: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{name}.safetensors")
