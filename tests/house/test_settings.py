"""Every setting that the code reads from the environment is written down for its users."""

from __future__ import annotations

import re
from pathlib import Path

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
