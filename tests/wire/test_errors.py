"""The catalogue: every error keeps its class, its words and its facts on the way."""

from __future__ import annotations

import copy
import pickle
import re

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adashard.wire import codec, errors
from adashard.wire.errors import (
    AdashardError,
    Code,
    Internal,
    InvalidRequest,
    InvalidSettings,
    ModelMismatch,
    StaleGeneration,
    catalogue,
    from_info,
)
from adashard.wire.messages import ErrorInfo

CLASSES = sorted(catalogue())

STATUSES = {
    "INVALID_ARGUMENT": {400},
    "FAILED_PRECONDITION": {400},
    "UNAUTHENTICATED": {401},
    "NOT_FOUND": {404},
    "ALREADY_EXISTS": {409},
    "ABORTED": {409},
    "RESOURCE_EXHAUSTED": {429},
    "INTERNAL": {500},
    "DATA_LOSS": {500},
    "UNAVAILABLE": {503},
    "DEADLINE_EXCEEDED": {504},
}


@given(
    st.sampled_from(CLASSES),
    st.text(),
    st.none() | st.text(),
    st.dictionaries(st.sampled_from(["message", "remedy", "self"]) | st.text(), st.text()),
)
def test_an_error_comes_back_from_the_wire_as_it_was(name, message, remedy, facts):
    error = catalogue()[name](message, remedy=remedy)
    error.facts.update(facts)
    back = from_info(codec.from_proto(codec.to_proto(error.info())))
    assert type(back) is type(error)
    assert (back.message, back.remedy, back.facts) == (error.message, error.remedy, error.facts)
    assert str(back) == str(error)


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_can_be_pickled_and_copied(name):
    error = catalogue()[name]("what", remedy="do", job="j", step=3)
    for other in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert other.info() == error.info()


@pytest.mark.parametrize("name", CLASSES)
def test_a_neutral_code_has_the_name_of_a_grpc_status_and_its_http_status(name):
    kind = catalogue()[name]
    assert grpc.StatusCode[kind.code.name]
    assert kind.http_status in STATUSES[kind.code.name]


def test_every_code_is_in_use():
    assert {kind.code for kind in catalogue().values()} == set(Code)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"AdashardError"}))
def test_an_error_says_what_to_do(name):
    error = catalogue()[name]("what")
    assert error.remedy
    assert str(error) == f"what\n  {error.remedy}"


def test_an_error_without_a_remedy_is_its_message():
    assert str(AdashardError("what")) == "what"
    assert str(StaleGeneration("what", remedy="")) == "what"


def test_an_error_of_a_later_version_is_internal_and_keeps_its_words():
    error = from_info(ErrorInfo(reason="Newer", message="what", remedy="do", metadata={"a": "b"}))
    assert type(error) is Internal
    assert (error.message, error.remedy, error.facts) == ("what", "do", {"a": "b"})


def test_facts_are_texts():
    assert ModelMismatch("what", step=3, job="j").facts == {"step": "3", "job": "j"}


def test_wrong_settings_are_a_value_error_as_in_torch():
    assert issubclass(InvalidSettings, ValueError)
    assert issubclass(InvalidSettings, InvalidRequest)


def test_the_tree_at_the_top_of_the_file_is_the_catalogue():
    assert errors.__doc__ is not None
    lines = re.findall(r"[├└]── (\w+) +(\d{3}|\S)", errors.__doc__)
    assert {name for name, _ in lines} | {"AdashardError"} == set(CLASSES)
    for name, status in lines:
        if status.isdigit():
            assert catalogue()[name].http_status == int(status)
