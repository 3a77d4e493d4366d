"""What tests may not do to each other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = re.compile(r"setattr\(\s*(\w+\.)?(time|random|os|socket|threading|uuid|asyncio|sys)\s*,")


def test_no_test_patches_a_module_that_other_threads_use():
    """Clusters of earlier tests run on in threads of the same process, and would be patched too."""
    found = [
        f"{path.relative_to(ROOT)}: {match.group(0)}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path != Path(__file__)
        for match in SHARED.finditer(path.read_text())
    ]
    assert found == []
