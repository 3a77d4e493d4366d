"""Two distributions of one version, and what each brings along."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import adashard


@pytest.fixture(scope="module")
def client(root: Path) -> dict[str, object]:
    return _project(root / "client")


@pytest.fixture(scope="module")
def server(root: Path) -> dict[str, object]:
    return _project(root / "server")


def test_both_distributions_have_one_version(
    client: dict[str, object], server: dict[str, object]
) -> None:
    assert client["version"] == server["version"]


def test_a_running_process_knows_the_version_that_is_installed(client: dict[str, object]) -> None:
    assert adashard.__version__ == client["version"]


def test_the_public_names_are_these() -> None:
    assert set(adashard.__all__) == {
        "Adafactor",
        "AdashardError",
        "GradScaler",
        "RemoteOptimizer",
        "__version__",
    }


def test_the_server_depends_on_the_client_of_its_own_version(server: dict[str, object]) -> None:
    assert f"adashard=={server['version']}" in server["dependencies"]


def test_the_changelog_speaks_of_this_version(client: dict[str, object], root: Path) -> None:
    assert f"## [{client['version']}]" in (root / "CHANGELOG.md").read_text()


def test_every_dependency_is_pinned(
    client: dict[str, object], server: dict[str, object], root: Path
) -> None:
    pins = _requirements(root / "constraints.txt")
    needed = [
        *map(Requirement, [*client["dependencies"], *server["dependencies"]]),
        *_requirements(root / "requirements-dev.txt").values(),
    ]
    names = {canonicalize_name(requirement.name) for requirement in needed}
    assert names - pins.keys() == {"adashard"}


def test_every_pin_is_one_public_version(root: Path) -> None:
    for requirement in _requirements(root / "constraints.txt").values():
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert "+" not in pin.version, f"{requirement}: a local label names a build of one index"


def test_every_pin_is_in_the_range_that_the_distributions_ask_for(
    client: dict[str, object], server: dict[str, object], root: Path
) -> None:
    pins = _requirements(root / "constraints.txt")
    for requirement in map(Requirement, [*client["dependencies"], *server["dependencies"]]):
        if requirement.name != "adashard":
            (pin,) = pins[canonicalize_name(requirement.name)].specifier
            assert requirement.specifier.contains(pin.version), str(requirement)


def test_the_command_starts_without_torch() -> None:
    """Healthchecks run it every few seconds, and torch alone takes seconds to load."""
    (loaded,) = _modules_after("adashard_server.cli")
    assert "typer" in loaded
    assert loaded.isdisjoint({"grpc", "numpy", "torch"})


def test_rooms_load_nothing_that_only_others_need() -> None:
    mathematics, client = _modules_after("adashard_server.optim.adafactor", "adashard.algorithms")
    assert "torch" in mathematics
    assert mathematics.isdisjoint({"fastapi", "google.protobuf", "grpc", "redis"})
    assert client.isdisjoint({"fastapi", "msgpack", "pydantic", "redis", "uvicorn"})


def _modules_after(*imports: str) -> list[set[str]]:
    """The modules in the memory of a new process after each of these imports."""
    script = """if True:
        import importlib, json, sys
        for name in sys.argv[1:]:
            importlib.import_module(name)
            print(json.dumps(list(sys.modules)))
    """
    command = [sys.executable, "-c", script, *imports]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


def _project(folder: Path) -> dict[str, object]:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def _requirements(path: Path) -> dict[str, Requirement]:
    """The lines of a requirements file, by normalised name."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in found}
