"""From our dataclasses to the generated protobuf messages of the same name, and back.

One generic walk over the fields that `schema.py` describes, so that a new field is added in two
places only: in `protos/` and in `messages.py`. The test beside it compares the two.

The hot path does not come through here: payloads are joined by hand in `frames.py`. What does is
at most some 100,000 numbers in repeated fields, and those are handed over in one call each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import Any, overload

from google.protobuf.message import Message

from adashard.wire import control, messages, spec
from adashard.wire.control import FromCoordinator, FromMember
from adashard.wire.errors import InvalidRequest
from adashard.wire.schema import Field, Form, fields_of
from adashard.wire.v1 import coordinator_pb2, peer_pb2, shard_pb2, types_pb2

AttendRequest = coordinator_pb2.AttendRequest
AttendResponse = coordinator_pb2.AttendResponse

# Dataclass to generated class, for all messages that have both.
_OURS = vars(spec) | vars(messages) | vars(control)
_GENERATED: dict[type[Any], type[Message]] = {
    _OURS[name]: getattr(module, name)
    for module in (types_pb2, shard_pb2, peer_pb2, coordinator_pb2)
    for name in module.DESCRIPTOR.message_types_by_name
    if dataclasses.is_dataclass(_OURS.get(name))
}
_DATACLASSES = {generated: kind for kind, generated in _GENERATED.items()}


def to_proto(value: object) -> Any:  # noqa: ANN401 - callers know which class is of the same name
    """The generated message of the same name as `value`'s class, equal to it field by field.

    Raises:
        TypeError: there is no such message.
        ValueError: a number does not fit into its field, a text is not valid unicode, or two
            members of a oneof are set; mistakes in the program, like the first.
    """
    generated = _GENERATED.get(type(value))
    if generated is None:
        raise TypeError(f"{type(value).__name__} has no message of its name in protos/")
    return generated(**_contents(value))


def from_proto(message: Message) -> Any:  # noqa: ANN401 - as above
    """The dataclass of the same name as `message`'s class, equal to it field by field.

    Raises:
        InvalidRequest: a message inside is missing, or an enum has a number of no meaning here.
        TypeError: there is no such dataclass; a mistake in the program.
    """
    kind = _DATACLASSES.get(type(message))
    if kind is None:
        raise TypeError(f"{message.DESCRIPTOR.name} has no dataclass of its name here")
    return _read(message, kind)


@overload
def pack(message: FromMember) -> AttendRequest: ...
@overload
def pack(message: FromCoordinator) -> AttendResponse: ...
def pack(message: FromMember | FromCoordinator) -> AttendRequest | AttendResponse:
    """`message` as it travels on the control stream, in the field that its class belongs to.

    Raises:
        TypeError: it is no message of the control stream.
    """
    envelope, name = _ENVELOPES.get(type(message), (None, ""))
    if envelope is None:
        raise TypeError(f"{type(message).__name__} does not travel on the control stream")
    contents: dict[str, Any] = {name: _contents(message)}
    return envelope(**contents)


@overload
def unpack(packed: AttendRequest) -> FromMember: ...
@overload
def unpack(packed: AttendResponse) -> FromCoordinator: ...
def unpack(packed: AttendRequest | AttendResponse) -> FromMember | FromCoordinator:
    """The message that travelled in `packed`.

    Raises:
        InvalidRequest: it carries none, or one of a kind that this version does not know, or
            what it carries cannot be read.
    """
    name = packed.WhichOneof("kind")
    if name is None:
        raise InvalidRequest(
            f"an {packed.DESCRIPTOR.name} came with no message of a kind that is known here"
        )
    message: FromMember | FromCoordinator = from_proto(getattr(packed, name))
    return message


def _envelopes() -> dict[type[Any], tuple[type[AttendRequest | AttendResponse], str]]:
    """For each message of the control stream, the message around it and its field there."""
    return {
        _OURS[field.message_type.name]: (envelope, field.name)
        for envelope in (AttendRequest, AttendResponse)
        for field in envelope.DESCRIPTOR.oneofs_by_name["kind"].fields
        if field.message_type
    }


_ENVELOPES = _envelopes()


@dataclasses.dataclass(frozen=True, slots=True)
class _Walk:
    """How one class is walked, worked out once: most fields are handed over as they are.

    Attributes:
        kind: the dataclass.
        names: of its fields, in order.
        read: their contents in an object or a message, in the same order.
        nested: place and description of those that hold messages.
        other: place and description of those whose contents a message gives in another form.
        oneofs: names of the members of each oneof.
    """

    kind: type[Any]
    names: tuple[str, ...]
    read: Callable[[object], tuple[Any, ...]]
    nested: tuple[tuple[int, Field], ...]
    other: tuple[tuple[int, Field], ...]
    oneofs: tuple[tuple[str, ...], ...]


_walks: dict[type[Any], _Walk] = {}


def _walk(kind: type[Any]) -> _Walk:
    """How `kind` is walked."""
    known = _walks.get(kind)
    if known is None:
        known = _walks[kind] = _walk_of(kind)
    return known


def _walk_of(kind: type[Any]) -> _Walk:
    fields = fields_of(kind)
    numbered = tuple(enumerate(fields))
    names = tuple(field.name for field in fields)
    groups = _GENERATED[kind].DESCRIPTOR.oneofs
    return _Walk(
        kind=kind,
        names=names,
        read=_reader(names),
        nested=tuple((place, field) for place, field in numbered if field.nested),
        other=tuple(
            (place, field)
            for place, field in numbered
            if field.nested or field.enumerated or field.form is not Form.ONE
        ),
        oneofs=tuple(tuple(member.name for member in group.fields) for group in groups),
    )


def _reader(names: tuple[str, ...]) -> Callable[[object], tuple[Any, ...]]:
    if len(names) < 2:  # attrgetter returns no tuple then
        return lambda value: tuple(getattr(value, name) for name in names)
    return attrgetter(*names)


def _contents(value: object) -> dict[str, Any]:
    """The fields of `value` in the form that constructors of messages take."""
    kind: type[Any] = type(value)
    walk = _walk(kind)
    contents = dict(zip(walk.names, walk.read(value), strict=True))
    for _, field in walk.nested:
        content = contents[field.name]
        if field.form is Form.MANY:
            contents[field.name] = [_contents(element) for element in content]
        elif content is not None:
            contents[field.name] = _contents(content)
    for group in walk.oneofs:
        _refuse_a_second_member(walk.kind, [name for name in group if contents[name] is not None])
    return contents


def _refuse_a_second_member(kind: type[Any], members: list[str]) -> None:
    """Setting one member of a oneof clears the others; nobody who set two meant that."""
    if len(members) > 1:
        raise ValueError(f"a {kind.__name__} has {members[0]!r} or {members[1]!r}, and not both")


def _read(message: Message, kind: type[Any]) -> Any:  # noqa: ANN401 - an instance of it
    walk = _walk(kind)
    contents = list(walk.read(message))
    for place, field in walk.other:
        contents[place] = _content(message, contents[place], field)
    return walk.kind(**dict(zip(walk.names, contents, strict=True)))


def _content(message: Message, raw: Any, field: Field) -> object:  # noqa: ANN401 - of protobuf
    """What a field of `message` holds, given in protobuf's form."""
    if field.form is Form.MAPPING:
        return dict(raw)
    if field.form is Form.MANY:
        if field.nested:
            return tuple([_read(element, field.item) for element in raw])
        if field.enumerated:
            return tuple([_member(element, field, message) for element in raw])
        return tuple(raw)
    if not field.nested:
        return _member(raw, field, message)
    if message.HasField(field.name):
        return _read(raw, field.item)
    if field.form is Form.OPTIONAL:
        return None
    raise InvalidRequest(f"a {message.DESCRIPTOR.name} came without its {field.name!r}")


def _member(number: int, field: Field, message: Message) -> object:
    """The member of the field's enum that `number` stands for."""
    try:
        return field.item(number)
    except ValueError:
        raise InvalidRequest(
            f"{field.name!r} of a {message.DESCRIPTOR.name} is {number}, "
            f"which is no {field.item.__name__} that is known here"
        ) from None
