"""A defect does not leave anybody waiting: the member goes, or the coordinator does."""

from __future__ import annotations

import asyncio

import pytest
from tests.rpc.test_coordinator_service import desk, hello, packed, said  # noqa: F401 - fixture

from adashard.wire.control import Bye, Renewal, ShardHello, Welcome
from adashard.wire.errors import Internal, from_info

pytestmark = pytest.mark.asyncio

WAIT_S = 60


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError("a defect")


async def test_a_member_whose_message_meets_a_defect_is_evicted_and_told(desk, monkeypatch, caplog):  # noqa: F811
    call = desk.attend()
    await call.write(packed(hello()))
    assert isinstance(await said(call), Welcome)
    monkeypatch.setattr(desk.service._coordinator, "handle", broken)
    await call.write(packed(Renewal()))
    bye = await said(call)
    assert isinstance(bye, Bye)
    assert isinstance(from_info(bye.error), Internal)
    assert await said(call) is None
    assert desk.service._coordinator.contacts["worker-1"].evicted is not None
    assert "a defect" in caplog.text
    assert not desk.service.ended.done(), "the others go on"


async def test_a_defect_in_deciding_ends_the_coordinator(desk, monkeypatch):  # noqa: F811
    monkeypatch.setattr(desk.service._coordinator, "tick", broken)
    with pytest.raises(Internal, match="a defect"):
        await asyncio.wait_for(desk.service.ended, WAIT_S)


async def test_a_defect_in_what_follows_a_write_ends_the_coordinator(desk, monkeypatch):  # noqa: F811
    monkeypatch.setattr(desk.service._coordinator, "swapped", broken)
    shard, worker = desk.attend(), desk.attend()
    address = ShardHello(address="127.0.0.1:1")
    await shard.write(packed(hello("shard-01", worker=None, shard=address)))
    await worker.write(packed(hello()))
    with pytest.raises(Internal, match="a defect"):
        await asyncio.wait_for(desk.service.ended, WAIT_S)
