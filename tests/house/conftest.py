"""What the house rules look at: the files of the repository."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "adashard": ROOT / "client/src/adashard",
    "adashard_server": ROOT / "server/src/adashard_server",
}
GENERATED = PACKAGES["adashard"] / "wire/v1"


def _repository_files() -> Iterator[Path]:
    """Files that are, or are about to be, in version control; all files where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        names = listing.stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if "/." not in str(path)]
    return (ROOT / name for name in names if name and (ROOT / name).is_file())


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def packages() -> dict[str, Path]:
    return PACKAGES


@pytest.fixture(scope="session")
def generated() -> Path:
    return GENERATED


@pytest.fixture(scope="session")
def files() -> list[Path]:
    return sorted(_repository_files())


@pytest.fixture(scope="session")
def texts(files: list[Path]) -> dict[Path, str]:
    """Every file that people can read, by its path from the root."""
    found = {}
    for path in files:
        content = path.read_bytes()
        if b"\0" not in content:
            found[path.relative_to(ROOT)] = content.decode()
    return found


@pytest.fixture(scope="session")
def modules(files: list[Path]) -> dict[Path, ast.Module]:
    """The syntax of every Python file that a person wrote, by its path from the root."""
    return {
        path.relative_to(ROOT): ast.parse(path.read_text())
        for path in files
        if path.suffix == ".py" and GENERATED not in path.parents
    }
