"""Reports over real gRPC: what cannot be right is refused; tests/shard has those that are taken."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.rpc.conftest import error_of
from tests.shard import jobs

from adashard.wire import codec
from adashard.wire.errors import InvalidRequest, StaleGeneration
from adashard.wire.messages import ExchangeRequest, Report

REPORT = Report(
    job=jobs.JOB,
    generation=1,
    sender="s0",
    step=1,
    workers=("a",),
    finite=True,
    slices=(0, 1),
    squared_sums=(1.0, 1.0),
)


def request(**changes) -> bytes:
    fields = {"receiver": "s0", "report": REPORT, "wanted": True, **changes}
    return codec.to_proto(ExchangeRequest(**fields)).SerializeToString()


def refused(wire, data: bytes) -> grpc.RpcError:
    call = wire.channel.unary_unary("/adashard.wire.v1.PeerService/Exchange")
    with pytest.raises(grpc.RpcError) as raised:
        call(data, timeout=60)
    return raised.value


def test_a_report_in_the_name_of_the_receiver_is_refused(wire):
    """It would stand in the place of its own."""
    assert isinstance(error_of(refused(wire, request())), InvalidRequest)
    wire.good_step()


@pytest.mark.parametrize("changes", [{"receiver": "s7"}, {"receiver": ""}])
def test_a_report_for_another_process_is_stale(wire, changes):
    assert isinstance(error_of(refused(wire, request(**changes))), StaleGeneration)


def test_a_request_without_a_report_is_refused_by_name(wire):
    error = error_of(refused(wire, b"\x0a\x02s0"))
    assert isinstance(error, InvalidRequest)
    assert "'report'" in error.message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=40))
def test_garbage_is_refused_and_the_next_report_is_looked_at(wire, garbage):
    refused(wire, garbage)
    stale = replace(REPORT, generation=9)
    assert isinstance(error_of(refused(wire, request(report=stale))), StaleGeneration)
