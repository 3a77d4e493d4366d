"""All benchmarks of speed, one after the other, and one table of what was asked and reached.

    python benchmarks/bench.py --venvs /tmp/peers           # under 15 minutes on two cores
    python benchmarks/bench.py --only update --only startup
    python benchmarks/bench.py --quick

Each script runs in a process of its own. Writes `benchmarks/results/<date>-<machine>.json` with the
numbers of all scripts, and a list `targets` of all their ratios; a target that is not met changes
nothing else. Ends with 1 if a script failed, which is in the table, too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import provenance, slug
from targets import Target, table, write_json

HERE = Path(__file__).resolve().parent
LIMIT_S = 600.0
_END_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Script:
    """A benchmark of this folder that takes `--json FILE` and writes a list `targets`.

    Attributes:
        arguments: of a whole run.
        quick: of a short one, instead.
        plots: whether it takes `--plots DIR`.
        peers: whether it takes `--venvs DIR`.
    """

    name: str
    file: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)
    plots: bool = False
    peers: bool = False


SCRIPTS = (
    Script(name="update", file="update.py"),
    Script(
        name="exchange", file="exchange.py", arguments=("--rounds", "5"), quick=("--rounds", "2")
    ),
    Script(
        name="pushpull", file="pushpull.py", arguments=("--rounds", "7"), quick=("--rounds", "3")
    ),
    Script(name="peers", file="peers_speed.py", peers=True),
    Script(name="startup", file="startup.py"),
    Script(name="growth", file="growth.py", plots=True),
)


class Failed(Exception):
    """A script has ended without its numbers; the message is what it said last."""


def run(script: Script, options: Namespace) -> dict[str, Any]:
    """A script's numbers; when this returns, or raises, none of its processes is left.

    Raises:
        Failed: it ended with an error, took longer than `LIMIT_S`, or wrote no targets.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        command = [sys.executable, str(HERE / script.file), "--json", str(results)]
        command += script.quick if options.quick else script.arguments
        if script.plots and options.plots:
            command += ["--plots", str(options.plots)]
        if script.peers and options.venvs:
            command += ["--venvs", str(options.venvs)]
        _run(command)
        try:
            found: dict[str, Any] = json.loads(results.read_text())
        except (OSError, ValueError) as error:
            raise Failed(f"no numbers: {error}") from None
    if "targets" not in found:
        raise Failed("its numbers have no targets")
    return found


def _run(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=HERE.parent,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, which can be ended as a whole
        )
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"no result after {LIMIT_S:.0f} s") from None
        finally:
            _end(process)
        if code != 0:
            output.seek(0)
            lines = [line.strip() for line in output if line.strip()]
            print(*lines[-20:], sep="\n", file=sys.stderr)
            raise Failed(lines[-1] if lines else f"exit code {code}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks a script that still runs to end what it has started, and kills what is left."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    with suppress(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    """Runs what was chosen, prints the table and writes the file."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that every `finally` is reached
    options = _options()
    numbers: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for script in SCRIPTS:
        if options.only and script.name not in options.only:
            continue
        began = time.monotonic()
        try:
            numbers[script.name] = run(script, options)
        except Failed as error:
            failed[script.name] = str(error)
        outcome = "failed" if script.name in failed else "done"
        print(f"{script.name}: {outcome} in {time.monotonic() - began:.0f} s", flush=True)
    by_script = {name: found["targets"] for name, found in numbers.items()}
    print(table(by_script, failed))
    record = {
        **provenance("benchmarks/bench.py"),
        "targets": all_targets(by_script),
        "failed": failed,
        "numbers": numbers,
    }
    path = options.json or _results(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    print(f"written: {path}")
    return 1 if failed else 0


def all_targets(by_script: dict[str, list[Target]]) -> list[Target]:
    """One list, in which each target says whose it is."""
    return [{"script": name, **one} for name, found in by_script.items() for one in found]


def _results(record: dict[str, Any]) -> Path:
    return HERE / "results" / f"{record['date']}-{slug(record['machine'])}.json"


def _options() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    names = [script.name for script in SCRIPTS]
    parser.add_argument("--only", action="append", choices=names, help="this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="short runs, for a look")
    parser.add_argument("--venvs", type=Path, metavar="DIR", help="of peers_speed.py --setup")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write plots there: docs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="instead of benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
