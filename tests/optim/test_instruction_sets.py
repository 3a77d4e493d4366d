"""The bits of a step do not depend on the width of the machine's vector unit."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping

import llvmlite.binding
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Code:
    """What the compiler is told to write for.

    Attributes:
        cpu: LLVM's name of it; None for this machine's.
        features: added to the CPU's or taken from it.
        needs: features without which the code does not run.
        vector_width: numbers that loops take at a time, where that is not left to the compiler.
    """

    cpu: str | None
    features: str = ""
    needs: tuple[str, ...] = ()
    vector_width: int | None = None

    def missing(self) -> list[str]:
        """What this machine lacks to run the code."""
        if self.cpu is None:
            return []
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return ["x86-64"]
        host = llvmlite.binding.get_host_cpu_features()
        return [feature for feature in self.needs if not host.get(feature)]


SSE2 = Code("x86-64")
WIDER = {
    "AVX2": Code("haswell", needs=("avx2", "fma", "bmi2")),
    # LLVM would rather use half of this CPU's vectors, for the sake of its clock.
    "AVX-512": Code(
        "skylake-avx512",
        features="-prefer-256-bit",
        needs=("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    ),
    # What goes together in AVX-512, in the instructions that this machine has.
    "16 at a time": Code(None, vector_width=16),
}


@functools.cache
def digest(code: Code | None) -> str:
    """What the program prints when it runs as that code, compiled afresh and kept nowhere.

    None is this machine's own code, as the rest of the tests have compiled and kept it.
    """
    if code is None:
        return printed([], os.environ)
    names = {"NUMBA_CPU_NAME": code.cpu, "NUMBA_CPU_FEATURES": code.features}
    arguments = [] if code.vector_width is None else [str(code.vector_width)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    with tempfile.TemporaryDirectory() as cache:
        afresh = {**kept, "NUMBA_CACHE_DIR": cache, **(names if code.cpu else {})}
        return printed(arguments, afresh)


def printed(arguments: list[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.optim.digest_of_steps", *arguments],
        cwd=ROOT,
        env=dict(environment),
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.mark.skipif(bool(SSE2.missing()), reason="this machine is not an x86-64")
def test_twenty_steps_of_this_machine_s_code_have_the_bits_of_sse2_code():
    assert digest(None) == digest(SSE2)


@pytest.mark.slow
@pytest.mark.timeout(600)  # everything is compiled afresh for each
@pytest.mark.skipif(bool(SSE2.missing()), reason="this machine is not an x86-64")
@pytest.mark.parametrize("name", WIDER)
def test_twenty_steps_of_fifteen_parameters_have_the_bits_of_sse2_code(name):
    missing = WIDER[name].missing()
    if missing:
        pytest.skip(f"this machine does not run {name} code: it has no {', '.join(missing)}")
    assert digest(WIDER[name]) == digest(SSE2)
    assert len(digest(SSE2)) == 64
