"""What a dataclass consists of, read once from its type hints.

The values of `messages.py` are carried into protobuf by `codec.py` and into plain maps by
`plain.py`. Both follow this description, so that a field is written down once: where it is
declared. Few forms are allowed, each with one meaning in protobuf:

    X                  a value              field, or message that must be there
    X | None           a dataclass or none  message, or member of a oneof
    tuple[X, ...]      values in order      repeated field
    Mapping[str, X]    scalars by name      map field

X is bool, int, float, str, bytes, an IntEnum or such a dataclass.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

SCALARS = (bool, int, float, str, bytes)


class Form(enum.Enum):
    """How often a field holds its item."""

    ONE = enum.auto()
    OPTIONAL = enum.auto()
    MANY = enum.auto()
    MAPPING = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of a dataclass.

    Attributes:
        name: its name.
        form: how often it holds an item.
        item: type of the value, of a tuple's elements, or of a mapping's values.
        nested: whether the items are dataclasses.
        enumerated: whether the items are members of an IntEnum.
        required: whether it has no default.
    """

    name: str
    form: Form
    item: type[Any]
    nested: bool
    enumerated: bool
    required: bool


def fields_of(kind: type) -> tuple[Field, ...]:
    """The fields of the dataclass `kind`, in the order in which they are declared.

    Raises:
        TypeError: `kind` is no dataclass, or a field's hint is of no form that is allowed; a
            mistake in the program.
    """
    known = _known.get(kind)
    if known is None:
        hints = get_type_hints(kind)
        known = tuple(_field(field, hints[field.name]) for field in dataclasses.fields(kind))
        _known[kind] = known
    return known


_known: dict[type, tuple[Field, ...]] = {}


def _field(declared: dataclasses.Field[Any], hint: object) -> Field:
    form, item = _form(hint)
    nested = dataclasses.is_dataclass(item)
    enumerated = isinstance(item, type) and issubclass(item, enum.IntEnum)
    scalar = item in SCALARS
    allowed = {
        Form.ONE: nested or enumerated or scalar,
        Form.OPTIONAL: nested,
        Form.MANY: nested or enumerated or scalar,
        Form.MAPPING: scalar,
    }
    if not allowed[form]:
        raise TypeError(f"field {declared.name!r} has the hint {hint}, which has no form here")
    return Field(
        name=declared.name,
        form=form,
        item=item,
        nested=nested,
        enumerated=enumerated,
        required=declared.default is declared.default_factory is dataclasses.MISSING,
    )


def _form(hint: object) -> tuple[Form, Any]:
    """The form of `hint`, and the hint of its items."""
    match get_origin(hint), get_args(hint):
        case origin, (item, ellipsis) if origin is tuple and ellipsis is Ellipsis:
            return Form.MANY, item
        case origin, (key, item) if origin is Mapping and key is str:
            return Form.MAPPING, item
        case types.UnionType, (item, nothing) if nothing is type(None):
            return Form.OPTIONAL, item
        case _:
            return Form.ONE, hint
