"""What must not be found in the tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

# Written in pieces, so that this file does not find itself.
REGISTRIES = re.compile(
    "|".join(
        host.replace(" ", r"\.")
        for host in (
            "pypi org",
            "pytho[n]hosted org",
            "registry npmjs org",
            "download pytorch org",
            "deb debian org",
            "registry-1 docker io",
            "ghcr io",
            "quay io",
            "proxy golang org",
        )
    )
)
MACHINE_PATHS = re.compile(r"(?<![\w.$}>-])/(?:root|home|work|Users|opt/wheels|opt/pypi)/\w")


def test_no_file_names_the_host_of_a_registry(texts: dict[Path, str]) -> None:
    assert _places(texts, REGISTRIES) == []


def test_no_file_names_a_path_of_one_machine(texts: dict[Path, str]) -> None:
    assert _places(texts, MACHINE_PATHS) == []


def test_the_patterns_find_what_they_are_for() -> None:
    assert REGISTRIES.search("https://" + "pypi" + ".org/simple")
    assert MACHINE_PATHS.search('"/' + 'root/x"')
    assert not MACHINE_PATHS.search("GET /api/v1/workers, tests/work/x and $HOME/work/x")


def test_no_test_sleeps(modules: dict[Path, ast.Module]) -> None:
    sleepers = [
        f"{path}:{node.lineno}"
        for path, module in modules.items()
        if path.parts[0] == "tests"
        for node in ast.walk(module)
        if _sleeps(node)
    ]
    assert sleepers == []


def _sleeps(node: ast.AST) -> bool:
    """Whether it is `x.sleep(...)`, or brings the name `sleep` in."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr == "sleep"
    return isinstance(node, ast.ImportFrom) and "sleep" in {alias.name for alias in node.names}


def _places(texts: dict[Path, str], pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()[:80]}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]
