"""The data plane over real gRPC: whatever comes, the shard lives on, and nothing is applied."""

from __future__ import annotations

import threading

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.rpc.conftest import GRADIENTS, SPEC, WEIGHTS, Wire, error_of, gradient_frame
from tests.shard import jobs
from tests.shard.tables import piece, read

from adashard.transport.grpc import GrpcTransport
from adashard.wire import codec
from adashard.wire.errors import (
    Internal,
    InvalidFrame,
    InvalidRequest,
    Overloaded,
    PortInUse,
    StaleGeneration,
)
from adashard.wire.frames import FRAME_BYTES_MAX, data_frame, leading_frame, read_frame
from adashard.wire.messages import Acknowledge, Record, Run, UploadBegin
from adashard.wire.v1 import shard_pb2
from adashard_server.rpc import shard_service
from adashard_server.rpc.shard_server import start_shard_server
from adashard_server.shard.engine import Engine


def weights_now(wire: Wire) -> dict[int, torch.Tensor]:
    version = wire.table.engine().version
    return wire.table.step(wire.begin(step=version, push=False), {}).weights


def refused(call) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value


# --- a step --------------------------------------------------------------------------------------


def test_a_step_is_answered_with_its_acknowledge_its_record_and_weights(wire):
    step = wire.step
    acknowledge, record, *weights = wire.good_step()
    assert read_frame(acknowledge).leading == Acknowledge(version=step - 1)
    leading = read_frame(record).leading
    assert isinstance(leading, Record)
    assert (leading.step, leading.workers) == (step, ("a",))
    reply = read(None, None, iter(weights))
    assert sorted(reply.weights) == [0, 1]
    assert wire.step == step + 1


def test_a_repeated_push_is_answered_again_and_changes_nothing(wire):
    begin = wire.begin()
    first = wire.call([leading_frame(begin), gradient_frame()])
    second = wire.call([leading_frame(begin), gradient_frame()])
    assert read_frame(second[0]).leading == Acknowledge(version=begin.step, complete=True)
    assert second[1:] == first[1:]


# --- what is refused -----------------------------------------------------------------------------

garbage = st.binary(max_size=60)


@st.composite
def torn(draw) -> bytes:
    frame = gradient_frame()
    return frame[: draw(st.integers(0, len(frame) - 1))]


@st.composite
def flipped(draw) -> bytes:
    """Bits of the header: those of the payload are a gradient like any other."""
    frame = bytearray(gradient_frame())
    frame[draw(st.integers(0, 63))] ^= 1 << draw(st.integers(0, 7))
    return bytes(frame)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(garbage, max_size=3))
def test_a_stream_that_begins_with_garbage_is_refused(wire, frames):
    error = error_of(refused(lambda: wire.call(frames)))
    assert type(error) in (InvalidFrame, InvalidRequest, StaleGeneration)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage | torn())
def test_garbage_behind_a_good_begin_is_refused_and_not_applied(wire, frame):
    before, version = weights_now(wire), wire.table.engine().version
    error = error_of(refused(lambda: wire.call([leading_frame(wire.begin()), frame])))
    assert isinstance(error, InvalidRequest)
    assert wire.table.engine().version == version
    after = weights_now(wire)
    assert all(torch.equal(before[index], after[index]) for index in before)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flipped())
def test_a_server_that_met_a_tampered_header_answers_the_next_good_call(wire, frame):
    begin = wire.begin()
    call = wire.push_pull(iter([leading_frame(begin), frame]), timeout=60)
    assert isinstance(read_frame(next(call)).leading, Acknowledge)
    # What is left of the frame may be a piece of the gradient: then the push waits for the rest.
    wire.call([leading_frame(begin), gradient_frame()])
    _drain(call)
    assert wire.table.engine().version == begin.step


def _drain(call) -> None:
    try:
        list(call)
    except grpc.RpcError:
        return


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (lambda wire: [], "begins with Begin, not NoneType"),
        (lambda wire: [gradient_frame()], "begins with Begin, not NoneType"),
        (lambda wire: [leading_frame(Acknowledge(version=0))], "not Acknowledge"),
        (lambda wire: [leading_frame(wire.begin())] * 2, "Begin comes first or not at all"),
        (
            lambda wire: [leading_frame(wire.begin(push=False, step=0)), gradient_frame()],
            "asks shard s0 for step 0|a pull carries no gradients",
        ),
        (lambda wire: [bytes(FRAME_BYTES_MAX + 1)], "over the limit"),
        (
            lambda wire: [leading_frame(wire.begin()), bytes(FRAME_BYTES_MAX + 1)],
            "over the limit",
        ),
        (
            lambda wire: [
                leading_frame(wire.begin()),
                data_frame(*zip(piece(1, GRADIENTS[1], 1, 3), strict=True)),
            ],
            "goes on at element 1, not 0",
        ),
        (lambda wire: [leading_frame(wire.begin(share=-1.0))], "share"),
        (lambda wire: [leading_frame(wire.begin(step=99))], "for step 99"),
    ],
)
def test_a_stream_that_cannot_be_right_is_refused_with_the_reason(wire, frames, words):
    before = weights_now(wire)
    error = error_of(refused(lambda: wire.call(frames(wire))))
    assert isinstance(error, InvalidRequest)
    with pytest.raises(type(error), match=words):
        raise error
    after = weights_now(wire)
    assert all(torch.equal(before[index], after[index]) for index in before)


def test_a_pull_with_gradients_is_refused(wire):
    pull = wire.begin(push=False, step=wire.table.engine().version)
    error = error_of(refused(lambda: wire.call([leading_frame(pull), gradient_frame()])))
    assert error.message == "a pull carries no gradients"


def test_a_foreign_generation_is_refused_as_stale(wire):
    foreign = jobs.begin(jobs.entry(SPEC, generation=9), "a", wire.step)
    error = error_of(refused(lambda: wire.call([leading_frame(foreign)])))
    assert isinstance(error, StaleGeneration)
    assert error.facts == {"generation": "9", "promised": "1"}


def test_an_unknown_error_is_internal_and_keeps_its_traceback_to_itself(wire, monkeypatch, caplog):
    def broken(*_):
        raise KeyError("a secret of the server")

    monkeypatch.setattr(Engine, "begin", broken)
    call = refused(lambda: wire.call([leading_frame(wire.begin())]))
    error = error_of(call)
    assert isinstance(error, Internal)
    assert error.message == call.details() == "PushPull failed on the server"
    assert "secret" not in repr(call.trailing_metadata())
    assert "a secret of the server" in caplog.text
    monkeypatch.undo()
    wire.good_step()


def test_more_streams_than_are_served_are_told_so(monkeypatch):
    monkeypatch.setattr(shard_service, "STREAMS_MAX", 1)
    wire = Wire()
    opened = threading.Event()
    ended = threading.Event()

    def slow():
        yield leading_frame(wire.begin())
        opened.set()
        ended.wait(60)
        yield gradient_frame()

    first = wire.push_pull(slow(), timeout=60)
    acknowledge = next(first)
    assert read_frame(acknowledge).leading == Acknowledge(version=0)
    error = error_of(refused(lambda: wire.call([leading_frame(wire.begin())])))
    assert isinstance(error, Overloaded)
    assert "1 streams" in error.message
    ended.set()
    assert len(list(first)) == 2
    wire.good_step()
    wire.close()


def test_a_port_that_is_taken_is_named(wire):
    with pytest.raises(PortInUse, match=f"127.0.0.1:{wire.port}") as refusal:
        start_shard_server(wire.table.shards["s0"], "127.0.0.1", wire.port)
    assert refusal.value.facts == {"bind": "127.0.0.1", "port": str(wire.port)}


# --- uploads -------------------------------------------------------------------------------------


def frozen() -> tuple[Wire, UploadBegin]:
    """A server whose shard waits for the slices of a new lineage."""
    wire = Wire()
    plan = jobs.plan(jobs.entry(SPEC, generation=2, lineage=2), sources=True)
    wire.table.freeze(plan.entry)
    wire.table.plan(plan)
    begin = UploadBegin(job=jobs.JOB, generation=2, sender="a", receiver="s0", version=0)
    return wire, begin


def test_whole_slices_are_taken_and_counted():
    wire, begin = frozen()
    runs, parts = zip(*(piece(index, one) for index, one in WEIGHTS.items()), strict=True)
    answer = wire.upload(iter([leading_frame(begin), data_frame(runs, parts)]), timeout=60)
    assert codec.from_proto(shard_pb2.UploadReply.FromString(answer)).slice_count == 2
    assert [planned.generation for planned in wire.table.told] == [1, 2]
    wire.close()


@pytest.mark.parametrize("frame", [b"", b"\xff" * 20, gradient_frame()[:-1]])
def test_an_upload_of_garbage_is_refused(frame):
    wire, begin = frozen()
    for frames in ([frame], [leading_frame(begin), frame]):
        call = refused(lambda frames=frames: wire.upload(iter(frames), timeout=60))
        assert isinstance(error_of(call), InvalidFrame)
    assert [planned.generation for planned in wire.table.told] == [1]
    wire.close()


def test_an_upload_to_an_open_generation_is_refused(wire):
    begin = UploadBegin(job=jobs.JOB, generation=1, sender="a", receiver="s0", version=0)
    call = refused(lambda: wire.upload(iter([leading_frame(begin)]), timeout=60))
    assert isinstance(error_of(call), StaleGeneration)


# --- the transport at the other end --------------------------------------------------------------


def test_the_transport_raises_the_class_that_the_server_raised(wire):
    transport = GrpcTransport()
    address = f"127.0.0.1:{wire.port}"
    foreign = jobs.begin(jobs.entry(SPEC, generation=9), "a", wire.step)
    with pytest.raises(StaleGeneration) as raised:
        list(transport.push_pull(address, [leading_frame(foreign)]))
    assert raised.value.facts == {"generation": "9", "promised": "1"}
    begin = UploadBegin(job=jobs.JOB, generation=1, sender="a", receiver="s0", version=0)
    with pytest.raises(StaleGeneration):
        transport.upload(address, [leading_frame(begin)])
    frames = list(transport.push_pull(address, [leading_frame(wire.begin()), gradient_frame()]))
    assert len(frames) == 3
    transport.close()
    transport.close()


def test_a_stream_that_is_cancelled_from_this_side_is_stale():
    wire = Wire()
    transport = GrpcTransport()
    ended = threading.Event()

    def frames():
        yield leading_frame(wire.begin())
        ended.wait(60)

    call = transport.push_pull(f"127.0.0.1:{wire.port}", frames())
    stream = iter(call)
    next(stream)
    call.cancel()
    ended.set()
    with pytest.raises(StaleGeneration, match="ended from this side"):
        next(stream)
    transport.close()
    wire.close()


def test_runs_of_no_elements_in_a_push_are_refused(wire):
    empty = data_frame([Run(slice=0, start=0, count=0, dtype=1)], [])
    error = error_of(refused(lambda: wire.call([leading_frame(wire.begin()), empty])))
    assert isinstance(error, InvalidFrame)
