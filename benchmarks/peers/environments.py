"""Virtual environments of the systems: made, looked into, run in.

Peers pin packages that exclude each other and adashard, so each has an environment of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
_ROOT = BENCHMARKS.parent
RUN_LIMIT_S = 300.0
OUTPUT_LINES = 15

_TELL_VERSIONS = """
import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version()} | {d: version(d) for d in sys.argv[1:]}))
"""


class RunFailed(Exception):
    """A process ended without a result; the message is the last thing that it said."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where one system is installed.

    Attributes:
        name: of the folder, among the others.
        distributions: what must be installed, and whose versions are told.
        installs: arguments for `pip install`, one call each; none for the environment of this
            process.
        variables: environment variables for every run.
    """

    name: str
    distributions: tuple[str, ...]
    installs: tuple[tuple[str, ...], ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict, hash=False)

    def python(self, folder: Path | None) -> Path | None:
        """The interpreter below the folder of all environments; None where there is none."""
        if not self.installs:
            return Path(sys.executable)
        python = folder / self.name / "bin" / "python" if folder else None
        return python if python and python.exists() else None


ADASHARD = Environment(
    name="adashard", distributions=("adashard", "adashard-server", "torch", "numpy")
)
TENSORFLOW = Environment(
    name="tensorflow",
    distributions=("tensorflow-cpu", "tf_keras", "numpy"),
    installs=(("tensorflow-cpu==2.21.0", "tf_keras==2.21.0"),),
    variables={"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"},
)
MXNET = Environment(
    name="mxnet",
    distributions=("mxnet", "numpy"),
    # mxnet 1.9.1 asks for a numpy that no longer has wheels, and works with this one.
    installs=(("numpy==1.23.5", "requests", "graphviz"), ("--no-deps", "mxnet==1.9.1")),
)
PEERS = (TENSORFLOW, MXNET)
"""Those whose results are compared."""

# glibc keeps what was freed, which a server of large tensors takes again in the next step.
_TUNED = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}
TORCH_RPC = Environment(name="torch", distributions=("torch",), variables=_TUNED)
RAY = Environment(
    name="ray",
    distributions=("ray", "torch", "adashard-server", "numpy"),
    installs=(
        ("-c", str(_ROOT / "constraints.txt"), f"torch=={version('torch').partition('+')[0]}"),
        ("-c", str(_ROOT / "constraints.txt"), "-e", str(_ROOT / "client")),
        ("-c", str(_ROOT / "constraints.txt"), "-e", str(_ROOT / "server")),
        ("ray==2.60.0",),
    ),
    variables={
        **_TUNED,
        "RAY_AUTH_MODE": "disabled",  # nothing is written into the home folder
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_preallocate_plasma_memory": "1",
        "RAY_worker_niceness": "0",
    },
)


def set_up(environment: Environment, folder: Path, python: str) -> None:
    """Makes the environment with this interpreter and installs into it; again does no harm.

    Raises:
        subprocess.CalledProcessError: venv or pip failed, and has said why.
    """
    home = folder / environment.name
    subprocess.run([python, "-m", "venv", str(home)], check=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    for packages in environment.installs:
        subprocess.run([*pip, *packages], check=True)


def versions(environment: Environment, python: Path | None) -> dict[str, str] | None:
    """Versions of Python and of the distributions; None if one is not installed."""
    if python is None:
        return None
    command = [str(python), "-c", _TELL_VERSIONS, *environment.distributions]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(told.stdout) if told.returncode == 0 else None


def run(environment: Environment, python: Path, module: str, arguments: Sequence[str]) -> None:
    """Runs a module of `peers`; when it returns, or raises, all its processes have ended.

    Raises:
        RunFailed: it reported an error, or took longer than RUN_LIMIT_S.
    """
    process = subprocess.Popen(
        [str(python), "-m", module, *arguments],
        cwd=BENCHMARKS,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment.variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, which can be ended as a whole
    )
    try:
        output, _ = process.communicate(timeout=RUN_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"no result after {RUN_LIMIT_S:.0f} s") from None
    finally:
        _end_group(process)
    if process.returncode != 0:
        lines = output.rstrip().splitlines()[-OUTPUT_LINES:]
        print(*lines, sep="\n", file=sys.stderr)
        raise RunFailed(_last_words(lines) or f"exit code {process.returncode}")


def _end_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(lines: Sequence[str]) -> str:
    """The last line that is not indented, with those below it: a traceback's error, whole."""
    starts = [index for index, line in enumerate(lines) if line and not line[0].isspace()]
    return " ".join(line.strip() for line in lines[starts[-1] :]) if starts else ""
