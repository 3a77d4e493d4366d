"""A step of GPT-2 small through parameter servers of other systems, over one through adashard.

    python benchmarks/peers_speed.py --setup /tmp/peers     # Ray's environment, once
    python benchmarks/peers_speed.py --venvs /tmp/peers --json peers_speed.json

Push, update and pull of 498 MB each way by one and by two workers, all processes of this machine.
Each peer is measured with torch's Adafactor and with the loops of our shards in its place: what is
left of the gap with the latter is the transport's, the rest the optimizer's. The systems run one
at a time, in turns; a ratio is the median over the rounds, of medians of steps.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import provenance
from peers import environments
from peers.environments import ADASHARD, RAY, TORCH_RPC, Environment, RunFailed, set_up
from targets import Target, print_targets, target, unmeasured, write_json
from turns import ratio

SCRIPT = "benchmarks/peers_speed.py"
WORKERS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class System:
    """A parameter server that is timed.

    Attributes:
        asked: how many times as long as ours its step with torch's optimizer is to take; 0 for
            adashard itself.
    """

    name: str
    environment: Environment
    module: str
    optimizers: tuple[str, ...] = ("torch", "ours")
    asked: float = 0.0


OURS = System(
    name="adashard", environment=ADASHARD, module="peers.adashard_steps", optimizers=("ours",)
)
PEERS = (
    System(
        name="torch.distributed.rpc",
        environment=TORCH_RPC,
        module="peers.torch_rpc",
        asked=2.3,
    ),
    System(name="Ray actor", environment=RAY, module="peers.ray_actor", asked=2.1),
)


class Round:
    """All systems once, one after the other."""

    def __init__(self, venvs: Path | None, steps: int) -> None:
        self._venvs, self._steps = venvs, steps
        self.notes: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self.medians: dict[str, dict[str, list[float]]] = {}

    def run(self, system: System) -> None:
        """Adds a system's medians of a round; one that is missing or fails is not tried again."""
        if system.name in self.missing:
            return
        python = system.environment.python(self._venvs)
        if environments.versions(system.environment, python) is None:
            self.missing[system.name] = f"{system.environment.name} is not installed (--setup)"
            return
        assert python is not None
        try:
            said = self._said(system, python)
        except RunFailed as error:
            self.missing[system.name] = f"failed: {error}"
            self.medians.pop(system.name, None)
            return
        if said["note"]:
            self.notes[system.name] = said["note"]
        kept = self.medians.setdefault(system.name, {})
        for phase, seconds in said["steps"].items():
            kept.setdefault(phase, []).append(statistics.median(seconds))

    def _said(self, system: System, python: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.json"
            arguments = [str(results), "--steps", str(self._steps)]
            arguments += ["--optimizers", *system.optimizers]
            environments.run(system.environment, python, system.module, arguments)
            found: dict[str, Any] = json.loads(results.read_text())
            return found


def targets(rounds: Round) -> list[Target]:
    """Peers over ours: as asked, and with our loops in them, which nothing is asked of."""
    found = []
    for system in PEERS:
        for workers in WORKERS:
            name = f"{system.name} / adashard, {workers} workers"
            lacking = [one for one in (system.name, OURS.name) if one in rounds.missing]
            if lacking:
                reason = rounds.missing[lacking[0]]
                found.append(unmeasured(name, system.asked, "higher", reason))
            else:
                reached = _ratio(rounds, system.name, f"{workers} torch", workers)
                found.append(target(name, system.asked, reached, "higher"))
    return found


def transports(rounds: Round) -> dict[str, float]:
    """Peers with our loops over ours: what of the gap is the transport's."""
    return {
        f"{system.name}, {workers} workers": _ratio(rounds, system.name, f"{workers} ours", workers)
        for system in PEERS
        if system.name in rounds.medians and OURS.name in rounds.medians
        for workers in WORKERS
    }


def _ratio(rounds: Round, peer: str, phase: str, workers: int) -> float:
    return ratio(rounds.medians[peer][phase], rounds.medians[OURS.name][f"{workers} ours"])


def main() -> int:
    """Reads the command line, measures, prints and writes."""
    options = _options()
    if options.setup is not None:
        set_up(RAY, options.setup, options.python)
        return 0
    rounds = Round(options.venvs, 3 if options.quick else options.steps)
    for turn in range(1 if options.quick else options.rounds):
        for system in (OURS, *PEERS)[:: 1 - 2 * (turn % 2)]:
            rounds.run(system)
            print(system.name, rounds.medians.get(system.name), rounds.missing.get(system.name, ""))
    found = targets(rounds)
    print_targets(found)
    print("with our loops in the peers:", transports(rounds))
    record = {
        **provenance(SCRIPT),
        "versions": {
            one.name: environments.versions(one.environment, one.environment.python(options.venvs))
            for one in (OURS, *PEERS)
        },
        "median_s": rounds.medians,
        "with_our_loops": transports(rounds),
        "missing": rounds.missing,
        "notes": rounds.notes,
        "targets": found,
    }
    write_json(options.json, record)
    return 1 if OURS.name in rounds.missing else 0


def _options() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, metavar="DIR", help="where --setup has been")
    parser.add_argument("--setup", type=Path, metavar="DIR", help="install Ray there, and end")
    parser.add_argument("--python", default=sys.executable, help="interpreter for --setup")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of each phase, that count")
    parser.add_argument("--quick", action="store_true", help="one round of 3 steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
