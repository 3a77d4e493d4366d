"""Logs: one line per event, for people at a terminal and as JSON everywhere else.

An event is a constant name and fields, `membership.info("worker_joined", extra={"job": "a", ...})`.
Three streams to read by, named below. Names of jobs come from users, so no field can break a line.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO

membership = logging.getLogger("adashard.membership")
"""Who came, who left, which generation holds."""

rounds = logging.getLogger("adashard.rounds")
"""Steps that ended in an unusual way: skipped, timed out, refused."""

errors = logging.getLogger("adashard.errors")
"""Defects, with their tracebacks."""

FIELDS = ("job", "shard", "worker", "step", "generation", "request_id")
"""Fields that come first in a line, in this order; further ones follow by name."""

_BUILT_IN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(
    level: str = "INFO",
    json: bool | None = None,
    *,
    stream: TextIO | None = None,
    on_record: Callable[[str, str], None] | None = None,
) -> None:
    """Send the logs of this process to `stream`; calling it again replaces what was set before.

    Args:
        level: lowest level of adashard's own events; uvicorn speaks from WARNING on.
        json: JSON lines if True, text if False; by default JSON unless the stream is a terminal.
        stream: standard error if None.
        on_record: called with logger and level of each line, to count them.

    Raises:
        ValueError: the level has no such name.
    """
    target = sys.stderr if stream is None else stream
    handler = _Handler(target, on_record)
    as_json = not target.isatty() if json is None else json
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    _attach(logging.getLogger("adashard"), handler, level.upper())
    _attach(logging.getLogger("uvicorn"), handler, "WARNING")


def _attach(logger: logging.Logger, handler: logging.Handler, level: str) -> None:
    for old in [old for old in logger.handlers if isinstance(old, _Handler)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ts, level, logger, event, the fields, and an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record; values that JSON does not know appear as text."""
        line: dict[str, object] = {
            "ts": _time(record).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, event and `name=value`; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record; values with spaces or control characters are quoted."""
        fields = "".join(f"  {name}={_word(value)}" for name, value in _fields(record).items())
        line = (
            f"{_time(record).astimezone():%H:%M:%S}  {record.levelname:<7}"
            f"  {_one_line(record.getMessage())}{fields}"
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Handler(logging.StreamHandler[TextIO]):
    """The one handler of ours on a logger; counts what it writes."""

    def __init__(self, stream: TextIO, on_record: Callable[[str, str], None] | None) -> None:
        super().__init__(stream)
        self._on_record = on_record

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if self._on_record is not None:
            self._on_record(record.name, record.levelname.lower())


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    extra = {name: value for name, value in vars(record).items() if name not in _BUILT_IN}
    first = {name: extra.pop(name) for name in FIELDS if name in extra}
    return first | dict(sorted(extra.items()))


def _word(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and text and not set(text) & set(' "=')
    return text if plain else json.dumps(text)


def _one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)
