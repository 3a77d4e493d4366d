"""The two ends of the contract, `messages.py`, `control.py` and `protos/`, say the same."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, get_args

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from adashard.wire import codec, control, messages, spec
from adashard.wire.control import (
    FromCoordinator,
    FromMember,
    Hello,
    ShardHello,
    Standing,
    WorkerHello,
)
from adashard.wire.errors import InvalidRequest
from adashard.wire.messages import Begin, GroupStep, Outcome, Record, Schedule
from adashard.wire.spec import AdafactorLayout, DType, FactoredAxes, Group, JobSpec
from adashard.wire.v1 import coordinator_pb2, peer_pb2, shard_pb2, types_pb2

MODULES = (types_pb2, shard_pb2, peer_pb2, coordinator_pb2)
# Written by hand in frames.py, or carried by pack and unpack.
WITHOUT_A_DATACLASS = {"Header", "Frame", "AttendRequest", "AttendResponse"}

DESCRIPTORS: dict[str, Descriptor] = {
    name: descriptor
    for module in MODULES
    for name, descriptor in module.DESCRIPTOR.message_types_by_name.items()
    if name not in WITHOUT_A_DATACLASS
}
OURS = vars(spec) | vars(messages) | vars(control)
KINDS = {
    name: kind
    for name, kind in OURS.items()
    if dataclasses.is_dataclass(kind) and isinstance(kind, type)
}

_SCALARS = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(allow_nan=False),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
}


@functools.cache
def instances(descriptor: Descriptor) -> st.SearchStrategy[Any]:
    """Dataclasses whose fields hold anything that the protobuf message can hold."""
    kind = KINDS[descriptor.name]
    optional = {field.name for field in dataclasses.fields(kind) if field.default is None}
    alone = {field.name for group in descriptor.oneofs for field in group.fields}
    contents = {
        field.name: _contents(field) | (st.none() if field.name in optional else st.nothing())
        for field in descriptor.fields
        if field.name not in alone
    }
    choices = [
        st.one_of(st.fixed_dictionaries({field.name: _items(field)}) for field in group.fields)
        for group in descriptor.oneofs
    ]
    return st.builds(
        lambda given, *chosen: kind(
            **given, **dict(item for one in chosen for item in one.items())
        ),
        st.fixed_dictionaries(contents),
        *(st.just({}) | choice for choice in choices),
    )


def _contents(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return st.dictionaries(_items(key), _items(value), max_size=3)
    if field.is_repeated:
        return st.lists(_items(field), max_size=3).map(tuple)
    return _items(field)


def _items(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type:
        return instances(field.message_type)
    if field.enum_type:
        return st.sampled_from(OURS[field.enum_type.name])
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=20)
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.text(max_size=20)
    return _SCALARS[field.cpp_type]


def test_every_message_has_a_dataclass_and_every_dataclass_a_message():
    assert set(KINDS) == set(DESCRIPTORS)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_dataclass_has_the_fields_of_its_message(name: str):
    declared = {field.name for field in dataclasses.fields(KINDS[name])}
    assert declared == {field.name for field in DESCRIPTORS[name].fields}


def test_enums_have_the_members_and_numbers_of_the_contract():
    for module in MODULES:
        for name, descriptor in module.DESCRIPTOR.enum_types_by_name.items():
            kind = OURS[name]
            prefix = descriptor.values[0].name.removesuffix("UNSPECIFIED")
            numbers = {value.name.removeprefix(prefix): value.number for value in descriptor.values}
            assert {member.name: member.value for member in kind} == numbers


@pytest.mark.parametrize("name", sorted(KINDS))
@settings(max_examples=25)  # of each kind: well over a thousand in all
@given(data=st.data())
def test_a_value_comes_back_from_its_bytes_as_it_was(name: str, data: st.DataObject):
    value = data.draw(instances(DESCRIPTORS[name]))
    message = codec.to_proto(value)
    assert message.DESCRIPTOR is DESCRIPTORS[name]
    back = codec.from_proto(type(message).FromString(message.SerializeToString()))
    assert type(back) is type(value)
    assert back == value


@pytest.mark.parametrize("kind", get_args(FromMember) + get_args(FromCoordinator))
@settings(max_examples=5)
@given(data=st.data())
def test_a_control_message_comes_back_from_its_envelope(kind: type, data: st.DataObject):
    value = data.draw(instances(DESCRIPTORS[kind.__name__]))
    packed = codec.pack(value)
    sent_by_a_member = kind in get_args(FromMember)
    assert isinstance(packed, codec.AttendRequest if sent_by_a_member else codec.AttendResponse)
    assert codec.unpack(type(packed).FromString(packed.SerializeToString())) == value


def test_every_kind_of_the_control_stream_can_be_packed():
    kinds = {
        field.message_type.name
        for envelope in (codec.AttendRequest, codec.AttendResponse)
        for field in envelope.DESCRIPTOR.fields
    }
    assert kinds == {kind.__name__ for kind in get_args(FromMember) + get_args(FromCoordinator)}


def test_a_message_without_content_is_told_from_none():
    hello = Hello(id="s", version="1", host="h", pid=1, shard=ShardHello(address="", device=""))
    back = codec.from_proto(codec.to_proto(hello))
    assert back.shard == ShardHello(address="", device="")
    assert back.worker is None


def test_of_a_oneof_the_member_that_was_set_comes_back():
    assert codec.to_proto(Group(adafactor=AdafactorLayout())).WhichOneof("algorithm") == "adafactor"
    assert codec.to_proto(Group()).WhichOneof("algorithm") is None


def test_two_members_of_a_oneof_are_a_mistake_and_not_silently_one():
    shard = ShardHello(address="a:1")
    worker = WorkerHello(
        job="j", spec=JobSpec(parameters=(), groups=(), slice_bytes=1, min_workers=1)
    )
    with pytest.raises(ValueError, match="'worker' or 'shard', and not both"):
        codec.to_proto(Hello(id="s", version="1", host="h", pid=1, shard=shard, worker=worker))


def test_not_a_number_travels():
    step = GroupStep(schedules=(Schedule(step_count=1, beta2=math.nan, rho=-math.inf),))
    (schedule,) = codec.from_proto(codec.to_proto(step)).schedules
    assert math.isnan(schedule.beta2)
    assert schedule.rho == -math.inf


def test_enums_come_back_as_members_and_not_as_numbers():
    layout = codec.from_proto(codec.to_proto(AdafactorLayout()))
    assert layout.factored_axes is FactoredAxes.LAST_TWO
    begin = Begin(job="j", generation=1, sender="w", receiver="s", step=1, push=True)
    assert codec.from_proto(codec.to_proto(begin)).dtypes[0] is DType.FLOAT32


def test_an_empty_envelope_is_refused():
    with pytest.raises(InvalidRequest, match="AttendRequest came with no message"):
        codec.unpack(codec.AttendRequest())


def test_a_kind_of_a_newer_version_is_refused():
    newer = codec.AttendResponse.FromString(b"\xfa\x06\x00")  # field 111, empty
    with pytest.raises(InvalidRequest, match="no message of a kind that is known here"):
        codec.unpack(newer)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (types_pb2.Record(outcome=9), "'outcome' of a Record is 9"),
        (shard_pb2.Begin(dtypes=[1, 77]), "'dtypes' of a Begin is 77"),
        (coordinator_pb2.WorkerHello(job="j"), "WorkerHello came without its 'spec'"),
        (coordinator_pb2.Freeze(), "Freeze came without its 'entry'"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(message: Any, words: str):
    with pytest.raises(InvalidRequest, match=words):
        codec.from_proto(message)


def test_what_has_no_counterpart_is_a_mistake_in_the_program():
    with pytest.raises(TypeError, match="no message of its name"):
        codec.to_proto(object())
    with pytest.raises(TypeError, match="no dataclass of its name"):
        codec.from_proto(shard_pb2.Frame())
    with pytest.raises(TypeError, match="does not travel on the control stream"):
        codec.pack(Standing(job="j", generation=1, version=1))  # type: ignore[call-overload]


def test_a_hundred_thousand_numbers_pass_in_one_field():
    record = Record(
        step=1,
        workers=("w",),
        shares=(1.0,),
        outcome=Outcome.APPLY,
        present=b"\xff" * 12500,
        step_counts=tuple(range(100_000)),
        groups=(),
    )
    assert codec.from_proto(codec.to_proto(record)) == record
