"""The version of both distributions, and which versions of the other side are understood."""

from __future__ import annotations

import re

from adashard.wire.errors import VersionSkew

VERSION = "0.1.0"

_NUMBERS = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})(?![0-9])")


def check_version(theirs: str, *, whose: str) -> None:
    """Refuses a version that is more than one minor version away.

    Args:
        theirs: the other side's, "major.minor.patch".
        whose: the other side, for the message, e.g. "the worker".

    Raises:
        VersionSkew: with both versions and which side to change.
    """
    mine, other = _major_minor(VERSION), _major_minor(theirs)
    if mine[0] == other[0] and abs(mine[1] - other[1]) <= 1:
        return
    older = whose if other < mine else "this side"
    raise VersionSkew(
        f"{whose} has adashard {theirs[:40]!r} and this side has {VERSION!r}",
        remedy=f"Versions up to one minor version apart work together: upgrade {older}.",
        theirs=theirs[:40],
        mine=VERSION,
    )


def _major_minor(version: str) -> tuple[int, int]:
    """The first two numbers; (-1, -1), which no version has, where these are none."""
    numbers = _NUMBERS.match(version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (-1, -1)
