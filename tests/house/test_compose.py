"""docker-compose.yml keeps its promises of safety, in the syntax that old and new Compose read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

# What docker-compose 1.29 does not know, at the top and in a service.
NEW_AT_THE_TOP = {"name", "include", "models"}
NEW_IN_SERVICES = {"develop", "gpus", "models", "provider", "post_start", "pre_stop"}


@pytest.fixture(scope="module")
def stack(root: Path) -> dict[str, dict]:
    return yaml.safe_load((root / "docker-compose.yml").read_text())


@pytest.fixture(scope="module")
def services(stack: dict[str, dict]) -> dict[str, dict]:
    return stack["services"]


def test_the_stack_is_read_by_docker_compose_of_1_29_too(
    stack: dict[str, dict], services: dict[str, dict]
) -> None:
    assert NEW_AT_THE_TOP.isdisjoint(stack)
    for service in services.values():
        assert NEW_IN_SERVICES.isdisjoint(service)
        assert "start_interval" not in service.get("healthcheck", {})


def test_ports_are_published_on_the_loopback_only(services: dict[str, dict]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_no_service_has_privileges_or_a_writable_root(services: dict[str, dict]) -> None:
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["init"]


def test_every_service_that_stays_has_a_healthcheck_in_exec_form(
    services: dict[str, dict],
) -> None:
    staying = {name: one for name, one in services.items() if "demo" not in one.get("profiles", [])}
    assert staying
    for service in staying.values():
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["restart"] == "unless-stopped"
        assert service["stop_grace_period"]


def test_the_image_has_the_version_of_the_distributions(
    services: dict[str, dict], root: Path
) -> None:
    version = re.search(r'^version = "(.+)"$', (root / "server/pyproject.toml").read_text(), re.M)
    assert version
    assert services["coordinator"]["image"] == f"adashard:{version[1]}"


def test_every_setting_of_the_stack_is_read_by_the_server(
    services: dict[str, dict], packages: dict[str, Path]
) -> None:
    given = {name for service in services.values() for name in service.get("environment", {})}
    command_line = (packages["adashard_server"] / "cli.py").read_text()
    assert given
    assert {name for name in given if f'"{name}"' not in command_line} == set()


def test_the_example_of_settings_holds_the_defaults_of_the_stack(root: Path) -> None:
    text = "\n".join(
        line for line in (root / "docker-compose.yml").read_text().splitlines() if "#" not in line
    )
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    example = (root / ".env.example").read_text().splitlines()
    assert dict(line.split("=", 1) for line in example if line and line[0] != "#") == used
