"""Skips are for machines of people, not for CI."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

MISSING_PROGRAM = """
    import pytest

    @pytest.mark.needs("no-such-program")
    def test_of_a_missing_program(): ...
"""
SKIPPED_FILE = """
    import pytest

    pytest.skip("not here", allow_module_level=True)
"""


@pytest.fixture
def project(pytester: pytest.Pytester, root: Path) -> pytest.Pytester:
    pytester.makeconftest((root / "tests/conftest.py").read_text())
    return pytester


@pytest.mark.parametrize("source", [MISSING_PROGRAM, SKIPPED_FILE])
def test_in_ci_a_skip_is_a_failure(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setenv("CI", "true")
    project.makepyfile(source)
    result = project.runpytest_inprocess("-p", "no:asyncio")
    assert result.ret != pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*In CI a skipped test is a failure*"])


def test_elsewhere_a_missing_program_is_a_skip_that_names_its_package(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    project.makepyfile(MISSING_PROGRAM)
    result = project.runpytest_inprocess("-p", "no:asyncio", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*Debian package no-such-program*"])
