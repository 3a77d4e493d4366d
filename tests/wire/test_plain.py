"""Values survive being stored, and what is stored wrongly is refused by its name."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adashard.wire import control, messages
from adashard.wire.control import Hello, Holding, ShardHello
from adashard.wire.errors import InvalidRequest
from adashard.wire.messages import GroupStep, Lineage, Member, Record, Schedule
from adashard.wire.plain import from_plain, to_plain
from adashard.wire.schema import Field, Form, fields_of
from adashard.wire.spec import AdafactorLayout, EpsPlacement, Group, JobSpec, Parameter

KINDS = sorted(
    (
        kind
        for kind in (vars(messages) | vars(control)).values()
        if dataclasses.is_dataclass(kind) and isinstance(kind, type)
    ),
    key=lambda kind: kind.__name__,
)

scalars: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=9),
    bytes: st.binary(max_size=9),
}
anything = st.recursive(
    st.none() | st.integers() | st.one_of(*scalars.values()) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=9,
)


@functools.cache
def instances(kind: type) -> st.SearchStrategy[Any]:
    """Any value of a dataclass."""
    return st.builds(kind, **{field.name: _contents(field) for field in fields_of(kind)})


def _contents(field: Field) -> st.SearchStrategy[Any]:
    items = instances(field.item) if field.nested else scalars.get(field.item)
    if items is None:
        items = st.sampled_from(field.item)
    return {
        Form.ONE: items,
        Form.OPTIONAL: st.none() | items,
        Form.MANY: st.lists(items, max_size=3).map(tuple),
        Form.MAPPING: st.dictionaries(st.text(max_size=9), items, max_size=3),
    }[field.form]


def is_plain(data: object) -> bool:
    if type(data) is list:
        return all(map(is_plain, data))
    if type(data) is dict:
        return all(type(key) is str and is_plain(item) for key, item in data.items())
    return data is None or type(data) in scalars


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)  # of each kind: well over a thousand in all
@given(data=st.data())
def test_a_value_comes_back_from_plain_data_as_it_was(kind: type, data: st.DataObject):
    value = data.draw(instances(kind))
    plain = to_plain(value)
    assert is_plain(plain)
    back = from_plain(kind, plain)
    assert type(back) is kind
    assert back == value


@given(kind=st.sampled_from(KINDS), data=anything)
def test_whatever_was_stored_is_read_or_refused(kind: type, data: object):
    with contextlib.suppress(InvalidRequest):
        assert isinstance(from_plain(kind, data), kind)


@given(st.sampled_from([messages.Plan, control.Hello, control.Renewal]), st.data())
def test_one_wrong_value_anywhere_is_read_or_refused(kind: type, data: st.DataObject):
    plain = to_plain(data.draw(instances(kind)))
    place, key = data.draw(st.sampled_from(list(_places(plain))))
    place[key] = data.draw(anything)
    with contextlib.suppress(InvalidRequest):
        assert isinstance(from_plain(kind, plain), kind)


def _places(data: Any):
    """Every container inside, with each of its keys."""
    keys = list(data) if isinstance(data, dict) else range(len(data))
    for key in keys:
        yield data, key
        if isinstance(data[key], dict | list):
            yield from _places(data[key])


LAYOUT = to_plain(AdafactorLayout())


def test_what_is_stored_names_its_fields():
    assert to_plain(Group(adafactor=AdafactorLayout(momentum=True))) == {
        "adafactor": {
            "factored_axes": 1,
            "min_dim_size_to_factor": 1,
            "momentum": True,
            "eps_placement": 1,
        }
    }


def test_a_field_of_a_newer_version_is_ignored():
    assert from_plain(Member, {"id": "a", "colour": "red"}) == Member(id="a")


def test_a_field_of_which_nothing_is_said_takes_its_default():
    assert from_plain(Group, {}) == Group()
    assert from_plain(Holding, {"job": "j", "weight_bytes": 1}).state_bytes == {}


def test_an_enum_comes_back_as_a_member():
    layout = from_plain(AdafactorLayout, LAYOUT | {"eps_placement": 2})
    assert layout.eps_placement is EpsPlacement.CLAMPED


def test_an_integer_is_read_as_a_float_and_not_the_other_way_round():
    assert type(from_plain(Schedule, {"step_count": 1, "beta2": 0, "rho": 1}).beta2) is float
    with pytest.raises(InvalidRequest, match=r"Schedule\.step_count is a float, and not a int"):
        from_plain(Schedule, {"step_count": 1.0, "beta2": 0.0, "rho": 1.0})


RECORD: dict[str, Any] = {
    "step": 1,
    "workers": [],
    "shares": [],
    "outcome": 1,
    "present": b"",
    "step_counts": [],
    "groups": [],
}
HELLO: dict[str, Any] = {"id": "s", "version": "1", "host": "h", "pid": 1}


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        (Member, [], "Member is a list, and not a map"),
        (Member, {}, r"Member\.id is missing"),
        (Member, {"id": 5}, r"Member\.id is a int, and not a str"),
        (Member, {"id": "a", "rank": True}, r"Member\.rank is a bool, and not a int"),
        (Member, {"id": "a", "leaving": 1}, r"Member\.leaving is a int, and not a bool"),
        (Member, {"id": "a", "rank": 2**63}, r"Member\.rank is an integer of more than 64 bits"),
        (Lineage, {"number": 10**5000, "origin": ""}, r"Lineage\.number is an integer of more"),
        (Schedule, {"step_count": 1, "beta2": 10**400, "rho": 1}, r"Schedule\.beta2 is an integer"),
        (Parameter, {"name": "w", "shape": [2, "3"]}, r"Parameter\.shape\[1\] is a str"),
        (Parameter, {"name": "w", "shape": "23"}, r"Parameter\.shape is a str, and not a list"),
        (Group, {"adafactor": LAYOUT | {"eps_placement": 7}}, r"eps_placement is 7, which is no E"),
        (Hello, HELLO | {"shard": {"address": None}}, r"Hello\.shard\.address is a NoneType"),
        (Record, RECORD | {"outcome": None}, r"Record\.outcome is a NoneType, and not a int"),
        (Record, RECORD | {"present": "x"}, r"Record\.present is a str, and not a bytes"),
        (Holding, {"job": "j", "weight_bytes": 1, "state_bytes": []}, "and not a map"),
        (Holding, {"job": "j", "weight_bytes": 1, "state_bytes": {1: 1}}, "and not a str as key"),
        (
            JobSpec,
            {"parameters": [{"name": "a"}, {}], "groups": [], "slice_bytes": 1, "min_workers": 1},
            r"JobSpec\.parameters\[1\]\.name is missing",
        ),
    ],
)
def test_what_is_stored_wrongly_is_refused_by_its_name(kind: type, data: object, words: str):
    with pytest.raises(InvalidRequest, match=words):
        from_plain(kind, data)


def test_none_is_told_from_a_value_without_content():
    hello = Hello(id="s", version="1", host="h", pid=1, shard=ShardHello(address="", device=""))
    assert from_plain(Hello, to_plain(hello)) == hello
    assert from_plain(GroupStep, {"adafactor": None}) == GroupStep()


# --- the forms a field can have ------------------------------------------------------------------


class Colour(enum.IntEnum):
    RED = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    one: int
    enumerated: Colour = Colour.RED
    optional: Everything | None = None
    many: tuple[bytes, ...] = ()
    mapping: Mapping[str, float] = dataclasses.field(default_factory=dict)


def test_a_field_is_described_by_its_hint():
    described = [
        (f.form, f.item, f.nested, f.enumerated, f.required) for f in fields_of(Everything)
    ]
    assert described == [
        (Form.ONE, int, False, False, True),
        (Form.ONE, Colour, False, True, False),
        (Form.OPTIONAL, Everything, True, False, False),
        (Form.MANY, bytes, False, False, False),
        (Form.MAPPING, float, False, False, False),
    ]


@pytest.mark.parametrize(
    "hint",
    [
        list[int],
        int | None,
        dict[str, int],
        tuple[int, str],
        Mapping[int, int],
        Mapping[str, Everything],
        tuple[tuple[int, ...], ...],
        object,
    ],
)
def test_a_hint_of_another_form_is_a_mistake_in_the_program(hint: Any):
    kind = dataclasses.make_dataclass("Kind", [("field", hint)])
    with pytest.raises(TypeError, match="field 'field' has the hint"):
        fields_of(kind)


def test_what_is_no_dataclass_is_a_mistake_in_the_program():
    with pytest.raises(TypeError):
        fields_of(int)
