"""What all tests share: the profiles of hypothesis, threads, and programs that may be missing."""

from __future__ import annotations

import os
import shutil

# Read by torch when it is imported. Several processes train at once on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

IN_CI = os.environ.get("CI") == "true"

# No deadlines: a test that asserts on time fails on a busy machine.
settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("ci" if IN_CI else "dev")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "needs(program): skipped where this program of the Debian package of the same name is not "
        "installed; fails there in CI",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for program in mark.args:
            if shutil.which(program) is None:
                pytest.skip(f"needs {program} (Debian package {program})")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    return _without_skips_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    return _without_skips_in_ci((yield))


def _without_skips_in_ci(report):
    """A test that never runs in CI protects nothing, and nobody would notice."""
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"In CI a skipped test is a failure. {reason}"
    return report
