"""Every setting that the code reads from the environment is written down for its users."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import typer

from adashard_server.cli import app

SETTING = re.compile(r"\bADASHARD_[A-Z][A-Z0-9_]*\b")
READERS = ("client/src/", "server/src/", "docker-compose.yml")


def test_every_environment_variable_is_in_the_readme(texts: dict[Path, str], root: Path) -> None:
    used = {
        name
        for path, text in texts.items()
        if str(path).startswith(READERS)
        for name in SETTING.findall(text)
    }
    assert "ADASHARD_ADDRESS" in used
    assert used - set(SETTING.findall((root / "README.md").read_text())) == set()


def test_the_readme_names_no_environment_variable_that_nobody_reads(
    texts: dict[Path, str], root: Path
) -> None:
    code = "\n".join(text for path, text in texts.items() if str(path).startswith(READERS))
    read = set(SETTING.findall(code))
    assert set(SETTING.findall((root / "README.md").read_text())) - read == set()


def test_the_readme_states_the_defaults_that_the_commands_have(root: Path) -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (root / "README.md").read_text().splitlines()
        if line.startswith("|") and SETTING.search(line)
    ]
    stated = {SETTING.findall(row[1])[0]: row[2] for row in rows}
    missing = {
        f"{name} = {default:g}, not {stated[name]}"
        for name, default in numeric_defaults()
        if default and f"{default:g}" not in stated[name].split(",")
    }
    assert missing == {f"ADASHARD_SLICE_BYTES = {4 << 20:g}, not 4 MiB"}, "which people can read"


def numeric_defaults() -> Iterator[tuple[str, float]]:
    """Environment variable and default of every option of the commands that is a number."""
    for command in walk(typer.main.get_command(app)):
        for parameter in command.params:
            if isinstance(parameter.default, int | float) and isinstance(parameter.envvar, str):
                yield parameter.envvar, parameter.default


def walk(command: click.Command) -> Iterator[click.Command]:
    yield command
    for one in getattr(command, "commands", {}).values():
        yield from walk(one)
