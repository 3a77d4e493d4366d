"""The layout of docs/architecture.md is kept."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

LINES_MAX = 500
HOMELESS = {"utils", "util", "common", "helpers", "helper", "misc"}


def test_no_file_is_longer_than_500_lines(modules: dict[Path, ast.Module], root: Path) -> None:
    lengths = {path: len((root / path).read_text().splitlines()) for path in modules}
    assert {path: n for path, n in lengths.items() if n > LINES_MAX} == {}


def test_no_module_is_a_home_for_the_homeless(modules: dict[Path, ast.Module]) -> None:
    assert [path for path in modules if HOMELESS & {*path.parts, path.stem}] == []


def test_every_room_says_what_it_is_for(
    packages: dict[str, Path], generated: Path, root: Path
) -> None:
    rooms = [
        folder
        for package in packages.values()
        for folder in (package, *package.rglob("*"))
        if folder.is_dir() and folder != generated and any(folder.glob("*.py"))
    ]
    assert len(rooms) > len(packages)
    silent = [room.relative_to(root) for room in rooms if not _docstring(room / "__init__.py")]
    assert silent == []


def test_generated_stubs_are_left_alone_by_the_linter_and_the_type_checker(
    root: Path, generated: Path
) -> None:
    tools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]
    assert str(generated.relative_to(root)) in tools["ruff"]["extend-exclude"]
    assert any(
        override["module"] == ["adashard.wire.v1.*"] and override["ignore_errors"]
        for override in tools["mypy"]["overrides"]
        if "ignore_errors" in override
    )


def _docstring(path: Path) -> str | None:
    return ast.get_docstring(ast.parse(path.read_text())) if path.exists() else None
