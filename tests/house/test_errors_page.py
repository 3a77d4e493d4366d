"""docs/errors.md has a section for every error of the catalogue."""

from __future__ import annotations

import runpy
from pathlib import Path

from adashard.wire import errors


def test_the_page_of_errors_is_the_catalogue(root: Path) -> None:
    page = runpy.run_path(str(root / "tools/errors_page.py"))["page"]()
    assert (root / "docs/errors.md").read_text() == page, "run 'make pages'"


def test_every_error_has_a_section_a_code_and_a_remedy(root: Path) -> None:
    page = (root / "docs/errors.md").read_text()
    for reason, kind in errors.catalogue().items():
        if kind.__module__ == errors.__name__ and kind is not errors.AdashardError:
            section = page.partition(f"\n## {reason}\n")[2].partition("\n## ")[0]
            assert kind.default_remedy, f"{reason} has no remedy"
            assert kind.default_remedy in section
            assert f"`{kind.code.name}`" in section
            assert str(kind.http_status) in section
