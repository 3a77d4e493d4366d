"""From our dataclasses to the generated protobuf messages of the same name, and back.

One generic walk over the fields that `schema.py` describes, so that a new field is added in two
places only: in `protos/` and in `messages.py`. The test beside it compares the two.

The hot path does not come through here: payloads are joined by hand in `frames.py`. What does is
at most some 100,000 numbers in repeated fields, and those are handed over in one call each.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, overload

from google.protobuf.message import Message

from adashard.wire import control, messages, spec
from adashard.wire.control import FromCoordinator, FromMember
from adashard.wire.errors import InvalidRequest
from adashard.wire.schema import Field, Form, fields_of
from adashard.wire.v1 import coordinator_pb2, peer_pb2, shard_pb2, types_pb2

AttendRequest = coordinator_pb2.AttendRequest
AttendResponse = coordinator_pb2.AttendResponse

T = TypeVar("T")

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
    message = generated()
    _write(value, message)
    return message


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
    packed = envelope()
    _write(message, getattr(packed, name))
    return packed


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


def _write(value: object, message: Message) -> None:
    """Set every field of `message` from `value`; a message without content is set as well."""
    message.SetInParent()
    for field in fields_of(type(value)):
        content = getattr(value, field.name)
        if field.form is Form.MAPPING:
            getattr(message, field.name).update(content)
        elif field.form is Form.MANY and field.nested:
            elements = getattr(message, field.name)
            for element in content:
                _write(element, elements.add())
        elif field.form is Form.MANY:
            getattr(message, field.name).extend(content)
        elif not field.nested:
            setattr(message, field.name, content)
        elif content is not None:
            _refuse_a_second_member(message, field)
            _write(content, getattr(message, field.name))


def _refuse_a_second_member(message: Message, field: Field) -> None:
    """Setting one member of a oneof clears the others; nobody who set two meant that."""
    group = message.DESCRIPTOR.fields_by_name[field.name].containing_oneof
    other = group and message.WhichOneof(group.name)
    if other:
        raise ValueError(
            f"a {message.DESCRIPTOR.name} has {other!r} or {field.name!r}, and not both"
        )


def _read(message: Message, kind: type[T]) -> T:
    return kind(**{field.name: _content(message, field) for field in fields_of(kind)})


def _content(message: Message, field: Field) -> object:
    """What `message` holds of `field`."""
    if field.form is Form.MAPPING:
        return dict(getattr(message, field.name))
    if field.form is Form.MANY:
        elements = getattr(message, field.name)
        if field.nested:
            return tuple(_read(element, field.item) for element in elements)
        if field.enumerated:
            return tuple(_member(element, field, message) for element in elements)
        return tuple(elements)
    if not field.nested:
        value = getattr(message, field.name)
        return _member(value, field, message) if field.enumerated else value
    if message.HasField(field.name):
        return _read(getattr(message, field.name), field.item)
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
