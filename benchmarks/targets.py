"""Ratios that were asked for, and what was reached: in every script's JSON, and as a table.

A target is a dictionary as it stands in JSON: `name`, `asked`, `reached` (None where it was not
measured), `met` (None likewise), `better` ("lower" or "higher"), and `reason` where there is one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Better = Literal["lower", "higher"]
Target = dict[str, Any]

_HEAD = ("script", "target", "asked", "reached", "")
_SIGNS: dict[str, str] = {"lower": "<=", "higher": ">="}


def target(name: str, asked: float, reached: float, better: Better) -> Target:
    """A ratio that was measured; one that is no number is not met, and stands as None.

    Args:
        name: what is divided by what, and of what.
        asked: the bound, which is met where it is just reached.
        reached: what was measured.
        better: on which side of the bound it is met.
    """
    if not math.isfinite(reached):
        found = unmeasured(name, asked, better, f"the measurement gave {reached}")
        return {**found, "met": False}
    met = reached <= asked if better == "lower" else reached >= asked
    return {"name": name, "asked": asked, "reached": reached, "met": met, "better": better}


def unmeasured(name: str, asked: float, better: Better, reason: str) -> Target:
    """A ratio that could not be measured, and why."""
    nothing = {"reached": None, "met": None}
    return {"name": name, "asked": asked, **nothing, "better": better, "reason": reason}


def write_json(path: Path | None, record: Mapping[str, Any]) -> None:
    """Writes a script's numbers, among them `targets`; nothing where no path was given."""
    if path is not None:
        path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def table(by_script: Mapping[str, Sequence[Target]], failed: Mapping[str, str]) -> str:
    """All targets as Markdown, script by script.

    Args:
        by_script: targets of the scripts that ended well, in their order.
        failed: what the others said, by script.
    """
    lines = [_HEAD]
    for script, targets in by_script.items():
        lines += [_line(script, one) for one in targets]
    lines += [(script, reason, "", "", "failed") for script, reason in failed.items()]
    return _markdown(lines)


def print_targets(targets: Iterable[Target]) -> None:
    """One script's targets, for whoever runs it by hand."""
    print(_markdown([_HEAD[1:], *(_line("", one)[1:] for one in targets)]))


def _line(script: str, one: Target) -> tuple[str, ...]:
    asked = f"{_SIGNS[one['better']]} {one['asked']:.3g}"
    if one["reached"] is None:
        return script, one["name"], asked, "not measured", one.get("reason", "")
    return script, one["name"], asked, f"{one['reached']:.3g}", "" if one["met"] else "not met"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([rows[0], "|" + "|".join("-" * (n + 2) for n in widths) + "|", *rows[1:]])
