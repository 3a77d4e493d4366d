"""Writes docs/errors.md from the classes of the catalogue, so that page and code cannot differ.

`make pages` runs it; a house test compares.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from adashard.wire import errors

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"

HEAD = """\
# Errors

Every error that adashard raises on purpose is a class of `adashard.wire.errors` and means the same
wherever it is met: a worker raises it, gRPC carries it as a status with its name, message, remedy
and facts, and REST answers it as a problem document (RFC 9457) whose `type` leads to the text below
(`GET /api/v1/errors/{name}`).

`AdashardError` is the base of all. `error.message` says what happened and where, `error.remedy`
what to do about it, and `error.facts` holds the same as fields.

This page is written from the classes themselves by `make pages`.
"""


def page() -> str:
    """The whole page, as Markdown."""
    kinds = _kinds()
    return "\n".join(
        [HEAD, *_overview(kinds), *(line for kind in kinds for line in _section(kind))]
    )


def _kinds() -> list[type[errors.AdashardError]]:
    """The concrete classes, in the order of the source: the base is never raised itself."""
    own = [
        kind
        for kind in errors.catalogue().values()
        if kind.__module__ == errors.__name__ and kind is not errors.AdashardError
    ]
    return sorted(own, key=lambda kind: inspect.getsourcelines(kind)[1])


def _overview(kinds: list[type[errors.AdashardError]]) -> list[str]:
    rows = [
        f"| [{kind.__name__}](#{kind.__name__.lower()}) | `{kind.code.name}` | {kind.http_status} |"
        for kind in kinds
    ]
    return ["| error | gRPC | HTTP |", "|---|---|---|", *rows, ""]


def _section(kind: type[errors.AdashardError]) -> list[str]:
    return [
        f"## {kind.__name__}",
        "",
        inspect.cleandoc(kind.__doc__ or ""),
        "",
        f"- **Remedy**: {kind.default_remedy}",
        f"- **gRPC** `{kind.code.name}`, **HTTP** {kind.http_status}{_bases(kind)}",
        "",
    ]


def _bases(kind: type[errors.AdashardError]) -> str:
    names = [base.__name__ for base in kind.__bases__ if base is not errors.AdashardError]
    return f"; caught as {' and '.join(f'`{name}`' for name in names)} too" if names else ""


if __name__ == "__main__":
    PAGE.write_text(page())
