"""Pages of a list: `limit` and an opaque `cursor` that names the last item of the page before.

The cursor holds a sort key and no position: members that come or go between two pages shift
nothing, so no item that stays is missed or seen twice.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterable
from typing import Annotated, TypeVar

from fastapi import Query

from adashard.wire.errors import InvalidRequest

LIMIT_MAX = 1000
"""Items on one page at most; a larger `limit` is lowered to this."""

Item = TypeVar("Item")
Key = tuple[int | str, ...]

Limit = Annotated[
    int, Query(description=f"Items on a page, from 1 to {LIMIT_MAX}; clamped, not refused.")
]
Cursor = Annotated[
    str | None, Query(description="`next_cursor` of the page before; leave out for the first.")
]


def page(
    items: Iterable[Item], key: Callable[[Item], Key], *, limit: int, cursor: str | None
) -> tuple[list[Item], str | None]:
    """The items after `cursor` in order of `key`, at most `limit`, and the next page's cursor.

    Args:
        items: in any order.
        key: differs between any two items; all keys have the same types.
        limit: clamped to 1 .. `LIMIT_MAX`.
        cursor: what this function answered before, or None.

    Raises:
        InvalidRequest: the cursor is not one of this list.
    """
    limit = clamp(limit, 1, LIMIT_MAX)
    after = _decode(cursor) if cursor is not None else None
    try:
        rest = sorted((one for one in items if after is None or key(one) > after), key=key)
    except TypeError as wrong_types:
        raise _foreign() from wrong_types
    shown = rest[:limit]
    return shown, _encode(key(shown[-1])) if len(rest) > limit else None


def clamp(number: int, lowest: int, highest: int) -> int:
    """The number, or the nearest bound where it lies outside."""
    return max(lowest, min(number, highest))


def _encode(key: Key) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode().rstrip("=")


def _decode(cursor: str) -> Key:
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        key = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError) as malformed:
        raise _foreign() from malformed
    if not isinstance(key, list):
        raise _foreign()
    return tuple(key)


def _foreign() -> InvalidRequest:
    return InvalidRequest(
        "The cursor is not one of this list.",
        remedy="Begin without a cursor, and pass on next_cursor as it is.",
    )
