"""The control plane over real grpc.aio: who may come in, and what those are told who may not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from grpc import aio
from tests.shard import jobs

from adashard.wire import codec
from adashard.wire.control import (
    Bye,
    Freeze,
    Hello,
    Logged,
    Renewal,
    ShardHello,
    Stale,
    Welcome,
    WorkerHello,
)
from adashard.wire.errors import InvalidRequest, PortInUse, Unauthenticated, VersionSkew, from_info
from adashard.wire.v1 import coordinator_pb2
from adashard.wire.v1.coordinator_pb2 import AttendRequest, AttendResponse
from adashard.wire.version import VERSION
from adashard_server.cluster.coordinator import Coordinator
from adashard_server.cluster.leases import LeaseSettings
from adashard_server.cluster.registry import MemoryRegistry
from adashard_server.rpc import coordinator_service
from adashard_server.rpc.coordinator_server import start_coordinator_server
from adashard_server.rpc.coordinator_service import CoordinatorService

pytestmark = pytest.mark.asyncio

TOKEN = "secret"
WITHOUT_A_SPEC = AttendRequest(
    hello=coordinator_pb2.Hello(worker=coordinator_pb2.WorkerHello(job="j"))
).SerializeToString()


class Desk:
    """A coordinator behind a real port; what its members would see is in the test's hand."""

    def __init__(self, service: CoordinatorService, server: aio.Server, port: int) -> None:
        self.service, self.server, self.port = service, server, port
        self.observed: list[tuple[str, object]] = []  # filled by the service
        self.channel = aio.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]
        )

    def attend(self) -> aio.StreamStreamCall:
        """A control stream of raw bytes."""
        return self.channel.stream_stream("/adashard.wire.v1.CoordinatorService/Attend")(timeout=60)


@pytest_asyncio.fixture
async def desk() -> AsyncIterator[Desk]:
    coordinator = Coordinator("c", (), leases=LeaseSettings(), min_shards=1, token=TOKEN, now=0.0)
    observed: list[tuple[str, object]] = []
    service = CoordinatorService(
        coordinator,
        MemoryRegistry(),
        clock=lambda: 0.0,
        announce=lambda event: None,
        observe=lambda member, message: observed.append((member, message)),
        keep=lambda instruction: None,
    )
    server, port = await start_coordinator_server(service, "127.0.0.1", 0)
    made = Desk(service, server, port)
    made.observed = observed
    ticking = asyncio.create_task(service.run())
    yield made
    ticking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await ticking
    service.hang_up()
    await made.channel.close()
    await server.stop(None)


def hello(name: str = "worker-1", **changes) -> Hello:
    worker = WorkerHello(job=jobs.JOB, spec=jobs.spec((2,)))
    fields = {"id": name, "version": VERSION, "host": "h", "pid": 1}
    return Hello(**{**fields, "token": TOKEN, "worker": worker, **changes})


def packed(message) -> bytes:
    return codec.pack(message).SerializeToString()


async def said(call: aio.StreamStreamCall) -> object:
    """The next message of the coordinator; None at the end of the stream."""
    data = await call.read()
    return None if data is aio.EOF else codec.unpack(AttendResponse.FromString(data))


async def answer_to(desk: Desk, first: bytes) -> Bye:
    call = desk.attend()
    await call.write(first)
    bye = await said(call)
    assert isinstance(bye, Bye)
    assert await said(call) is None, "the stream ends with the refusal"
    assert await call.code() is grpc.StatusCode.OK
    return bye


async def assert_alive(desk: Desk) -> None:
    call = desk.attend()
    await call.write(packed(hello("worker-2")))
    assert isinstance(await said(call), Welcome)
    call.cancel()


async def test_a_member_that_says_hello_is_welcome(desk):
    call = desk.attend()
    await call.write(packed(hello()))
    welcome = await said(call)
    assert (welcome.version, welcome.job_version) == (VERSION, -1)
    assert (welcome.lease_s, welcome.renew_s) == (15.0, 1.0)


async def test_what_is_no_hello_is_refused_by_name(desk):
    bye = await answer_to(desk, packed(Renewal()))
    error = from_info(bye.error)
    assert isinstance(error, InvalidRequest)
    assert error.message == "a control stream begins with Hello, not Renewal"
    await assert_alive(desk)


async def test_a_stream_that_says_nothing_is_refused(desk):
    call = desk.attend()
    await call.done_writing()
    bye = await said(call)
    assert from_info(bye.error).message.endswith("not NoneType")
    await assert_alive(desk)


@pytest.mark.parametrize("token", ["", "wrong", "secre", "secret "])
async def test_a_wrong_token_is_refused(desk, token):
    bye = await answer_to(desk, packed(hello(token=token)))
    assert isinstance(from_info(bye.error), Unauthenticated)
    assert bye.job == jobs.JOB
    assert TOKEN not in bye.error.message
    await assert_alive(desk)


@pytest.mark.parametrize("version", ["0.9.0", "9.0.0", "", "x"])
async def test_a_version_too_far_away_is_refused_and_both_are_named(desk, version):
    bye = await answer_to(desk, packed(hello(version=version)))
    error = from_info(bye.error)
    assert isinstance(error, VersionSkew)
    assert repr(version) in error.message
    assert repr(VERSION) in error.message


@pytest.mark.parametrize("data", [b"", b"\xfa\x06\x00", WITHOUT_A_SPEC])
async def test_a_message_of_no_meaning_is_refused(desk, data):
    bye = await answer_to(desk, data)
    assert isinstance(from_info(bye.error), InvalidRequest)
    await assert_alive(desk)


async def test_bytes_that_are_no_message_end_their_call_and_nothing_else(desk):
    call = desk.attend()
    await call.write(b"\xff" * 30)
    with pytest.raises(grpc.RpcError):
        await said(call)
    await assert_alive(desk)


async def test_a_message_of_no_meaning_behind_a_hello_cuts_its_member_off(desk):
    call = desk.attend()
    await call.write(packed(hello()))
    assert isinstance(await said(call), Welcome)
    await call.write(b"")
    bye = await said(call)
    assert isinstance(from_info(bye.error), InvalidRequest)
    assert await said(call) is None
    await assert_alive(desk)


async def test_a_second_stream_of_a_member_ends_the_first(desk):
    first, second = desk.attend(), desk.attend()
    await first.write(packed(hello()))
    assert isinstance(await said(first), Welcome)
    await second.write(packed(hello()))
    assert isinstance(await said(second), Welcome)
    assert await said(first) is None
    await second.write(packed(Logged(job=jobs.JOB, step=1, values={"loss": 1.0})))
    await second.write(b"")  # and a refusal, which comes after what was said before
    await said(second)
    assert desk.observed == [("worker-1", Logged(job=jobs.JOB, step=1, values={"loss": 1.0}))]


async def test_a_job_with_worker_and_shard_is_frozen(desk):
    worker, shard = desk.attend(), desk.attend()
    await shard.write(
        packed(hello("shard-01", worker=None, shard=ShardHello(address="127.0.0.1:1")))
    )
    assert isinstance(await said(shard), Welcome)
    await worker.write(packed(hello()))
    assert isinstance(await said(worker), Welcome)
    for call in (worker, shard):
        message = await said(call)
        assert isinstance(message, Freeze)
        assert [member.id for member in message.entry.workers] == ["worker-1"]


async def test_who_has_promised_more_to_another_coordinator_ends_this_one(desk):
    worker, shard = desk.attend(), desk.attend()
    await shard.write(
        packed(hello("shard-01", worker=None, shard=ShardHello(address="127.0.0.1:1")))
    )
    await worker.write(packed(hello()))
    assert isinstance(await said(worker), Welcome)
    freeze = await said(worker)
    await worker.write(packed(Stale(job=jobs.JOB, promised=freeze.entry.generation + 1)))
    reason = await asyncio.wait_for(desk.service.ended, 60)
    assert "has promised generation" in reason


async def test_a_member_that_does_not_read_is_cut_off_instead_of_filling_memory():
    outbox = asyncio.Queue(2)
    for _ in range(3):
        coordinator_service._put(outbox, Bye(job="", generation=1))
    assert outbox.qsize() == 1
    assert outbox.get_nowait() is None


async def test_a_port_that_is_taken_is_named(desk):
    with pytest.raises(PortInUse, match=str(desk.port)):
        await start_coordinator_server(desk.service, "127.0.0.1", desk.port)
