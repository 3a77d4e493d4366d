"""How far a system's result on several servers is from its result on one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from peers import environments
from peers.environments import Environment, RunFailed
from peers.matrices import Matrix, Training, load_weights, save_trainings

SERVERS = (1, 2, 4)
"""One is run twice: against itself it shows what a difference owes to chance."""

Status = Literal["measured", "not installed", "failed"]


@dataclass(frozen=True, kw_only=True)
class System:
    """An optimizer of a parameter server, and the module that trains with it."""

    name: str
    optimizer: str
    environment: Environment
    module: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One training on so many servers, against the same on one.

    Attributes:
        difference: largest absolute difference of an element to the result on one server.
        largest_update: how far the element went that went farthest, over all steps, on one server.
        relative: difference / largest_update. All three are None unless measured.
        reason: what a failed run said.
    """

    system: str
    optimizer: str
    servers: int
    training: str
    status: Status
    difference: float | None = None
    largest_update: float | None = None
    relative: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """All measurements of a system, and its weights on one server if it came that far."""

    system: System
    measurements: tuple[Measurement, ...]
    one_server: Mapping[str, Matrix] | None = None


class Laboratory:
    """Trains systems on the same matrices.

    Args:
        trainings: by name.
        venvs: folder of the peers' environments; None for none.
        folder: an empty one, for what travels between processes.
    """

    def __init__(self, trainings: Mapping[str, Training], venvs: Path | None, folder: Path) -> None:
        self._trainings = trainings
        self._venvs = venvs
        self._inputs, self._outputs = folder / "trainings.npz", folder / "weights.npz"
        save_trainings(self._inputs, trainings)

    def versions(self, environment: Environment) -> dict[str, str] | None:
        """What is installed there; None if the system is not."""
        return environments.versions(environment, environment.python(self._venvs))

    def measure(self, system: System) -> Series:
        """Trains on one server, and then on each number of servers."""
        if self.versions(system.environment) is None:
            return Series(system=system, measurements=self._without(system, "not installed"))
        try:
            reference = self._train(system, servers=1)
        except RunFailed as error:
            failed = self._without(system, "failed", reason=str(error))
            return Series(system=system, measurements=failed)
        measurements = tuple(
            measurement
            for servers in SERVERS
            for measurement in self._compare(system, servers, reference)
        )
        return Series(system=system, measurements=measurements, one_server=reference)

    def distance(self, name: str, ours: Matrix, reference: Matrix) -> tuple[float, float]:
        """Largest difference to the reference, and the reference's largest update."""
        update = np.abs(reference - self._trainings[name].weights).max()
        return float(np.abs(ours - reference).max()), float(update)

    def _compare(
        self, system: System, servers: int, reference: Mapping[str, Matrix]
    ) -> tuple[Measurement, ...]:
        try:
            weights = self._train(system, servers=servers)
        except RunFailed as error:
            return self._without(system, "failed", (servers,), reason=str(error))
        return tuple(
            self._measurement(system, servers, name, weights[name], reference[name])
            for name in self._trainings
        )

    def _measurement(
        self, system: System, servers: int, name: str, weights: Matrix, reference: Matrix
    ) -> Measurement:
        difference, largest_update = self.distance(name, weights, reference)
        return Measurement(
            system=system.name,
            optimizer=system.optimizer,
            servers=servers,
            training=name,
            status="measured",
            difference=difference,
            largest_update=largest_update,
            relative=difference / largest_update,
        )

    def _without(
        self,
        system: System,
        status: Status,
        servers: tuple[int, ...] = SERVERS,
        *,
        reason: str = "",
    ) -> tuple[Measurement, ...]:
        """In the place of measurements that there are not."""
        return tuple(
            Measurement(
                system=system.name,
                optimizer=system.optimizer,
                servers=count,
                training=name,
                status=status,
                reason=reason,
            )
            for count in servers
            for name in self._trainings
        )

    def _train(self, system: System, *, servers: int) -> dict[str, Matrix]:
        """Weights after the last step, by training.

        Raises:
            RunFailed: there are none, or they are of no use.
        """
        print(f"{system.name} {system.optimizer}, servers: {servers}", file=sys.stderr)
        python = system.environment.python(self._venvs)
        assert python is not None, "asked of a system that is not installed"
        self._outputs.unlink(missing_ok=True)
        arguments = [str(self._inputs), str(self._outputs), "--servers", str(servers)]
        environments.run(system.environment, python, system.module, [*arguments, *system.arguments])
        weights = load_weights(self._outputs)
        self._check(weights)
        return weights

    def _check(self, weights: Mapping[str, Matrix]) -> None:
        for name, training in self._trainings.items():
            if not np.isfinite(weights[name]).all():
                raise RunFailed(f"{name}: weights are not finite")
            if np.array_equal(weights[name], training.weights):
                raise RunFailed(f"{name}: weights are those before the first step")
