"""From our dataclasses to plain maps, lists and numbers, and back: how they are stored.

Unlike protobuf a plain map names its fields, so it can be read by people, and by a later version
that has more fields or fewer. Whoever stores one adds a version of the schema of their own.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, TypeVar

from adashard.wire.errors import InvalidRequest
from adashard.wire.schema import Field, Form, fields_of

# Whole numbers fit into 64 bits on the wire and in msgpack; so they are bounded here as well.
INTEGERS = range(-(1 << 63), 1 << 63)

T = TypeVar("T")


def to_plain(value: object) -> Any:  # noqa: ANN401 - any of the forms that json calls a value
    """`value` as dicts, lists, numbers, texts and bytes; enums as their numbers.

    Args:
        value: a dataclass of the forms that `schema.py` allows, or anything inside one.
    """
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_plain(getattr(value, field.name)) for field in fields_of(type(value))
        }
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return int(value) if isinstance(value, enum.IntEnum) else value


def from_plain(kind: type[T], data: object) -> T:
    """The `kind` that `data` describes.

    Names that `kind` does not have are ignored. A field without a value takes its default.

    Args:
        kind: a dataclass.
        data: what `to_plain` made of one, perhaps in another version, perhaps damaged.

    Raises:
        InvalidRequest: a value is not of its field's type, or is missing and has no default.
            Nothing else is ever raised, whatever `data` is.
    """
    return _read(kind, data, kind.__name__)


def _read(kind: type[T], data: object, path: str) -> T:
    """The dataclass that `data` describes; `path` says where it stands, for errors."""
    if not isinstance(data, Mapping):
        raise _misplaced(data, "a map", path)
    contents = dict[str, object]()
    for field in fields_of(kind):
        where = f"{path}.{field.name}"
        if field.name in data:
            contents[field.name] = _content(field, data[field.name], where)
        elif field.required:
            raise InvalidRequest(f"{where} is missing")
    return kind(**contents)


def _content(field: Field, data: object, path: str) -> object:
    """What `data` says of a field."""
    if field.form is Form.OPTIONAL and data is None:
        return None
    if field.form is Form.MANY:
        if not isinstance(data, list | tuple):
            raise _misplaced(data, "a list", path)
        return tuple(_item(field, item, f"{path}[{n}]") for n, item in enumerate(data))
    if field.form is Form.MAPPING:
        if not isinstance(data, Mapping):
            raise _misplaced(data, "a map", path)
        return {_key(key, path): _item(field, item, f"{path}[...]") for key, item in data.items()}
    return _item(field, data, path)


def _key(key: object, path: str) -> str:
    if not isinstance(key, str):
        raise _misplaced(key, "a str as key", path)
    return key


def _item(field: Field, data: object, path: str) -> object:
    """One item of a field: a dataclass, a member of an enum, or a scalar."""
    if field.nested:
        return _read(field.item, data, path)
    if field.enumerated:
        number = _scalar(int, data, path)
        try:
            return field.item(number)
        except ValueError:
            raise InvalidRequest(f"{path} is {number}, which is no {field.item.__name__}") from None
    return _scalar(field.item, data, path)


def _scalar(kind: type[object], data: object, path: str) -> object:
    """A scalar of exactly this type; a float may have been stored as an integer."""
    if type(data) is int and data not in INTEGERS:
        raise InvalidRequest(f"{path} is an integer of more than 64 bits")
    if type(data) is kind:
        return data
    if kind is float and type(data) is int:
        return float(data)
    raise _misplaced(data, f"a {kind.__name__}", path)


def _misplaced(data: object, wanted: str, path: str) -> InvalidRequest:
    return InvalidRequest(f"{path} is a {type(data).__name__}, and not {wanted}")
