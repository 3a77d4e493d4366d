"""The version of both distributions, and which versions of the other side are understood."""

from __future__ import annotations

from adashard.wire.errors import VersionSkew

VERSION = "0.1.0"


def check_version(theirs: str, *, whose: str) -> None:
    """Refuses a version that is more than one minor version away.

    Args:
        theirs: the other side's, "major.minor.patch".
        whose: the other side, for the message, e.g. "the worker".

    Raises:
        VersionSkew: with both versions and which side to change.
    """
    mine = _major_minor(VERSION)
    try:
        other = _major_minor(theirs)
    except ValueError:
        other = (-1, -1)
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
    major, minor, *_ = version.split(".")
    return int(major), int(minor)
