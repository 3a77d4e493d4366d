"""A real server of a tiny shard, and raw calls to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import grpc
import pytest
import torch
from tests.shard import jobs
from tests.shard.tables import Table, piece

from adashard.transport.grpc import ERROR_KEY
from adashard.wire import codec
from adashard.wire.errors import AdashardError, from_info
from adashard.wire.frames import data_frame, leading_frame
from adashard.wire.messages import Begin
from adashard.wire.v1 import types_pb2
from adashard_server.rpc.shard_server import start_shard_server

SPEC = jobs.spec((4, 2), (3,))
WEIGHTS = {0: torch.ones(4, 2), 1: torch.ones(3)}
GRADIENTS = {0: torch.arange(8.0).reshape(4, 2), 1: torch.arange(3.0)}


class Wire:
    """A shard of one job behind a real port; calls carry raw bytes."""

    def __init__(self) -> None:
        self.table = Table()
        self.table.open(jobs.plan(jobs.entry(SPEC)), WEIGHTS)
        self.server, self.port = start_shard_server(self.table.shards["s0"], "127.0.0.1", 0)
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{self.port}",
            options=[("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)],
        )
        self.push_pull = self.channel.stream_stream("/adashard.wire.v1.ShardService/PushPull")
        self.upload = self.channel.stream_unary("/adashard.wire.v1.ShardService/Upload")

    @property
    def step(self) -> int:
        return self.table.engine().version + 1

    def begin(self, **options) -> Begin:
        assert self.table.entry is not None
        step = options.pop("step", self.step)
        groups = (jobs.group_step(range(1, step + 1)),)
        begin = jobs.begin(self.table.entry, "a", step, version=step - 1, groups=groups)
        return replace(begin, **options)

    def call(self, frames: Iterable[bytes]) -> list[bytes]:
        return list(self.push_pull(iter(frames), timeout=60))

    def good_step(self) -> list[bytes]:
        return self.call([leading_frame(self.begin()), gradient_frame()])

    def close(self) -> None:
        self.channel.close()
        self.server.stop(None).wait()


def gradient_frame() -> bytes:
    runs, parts = zip(*(piece(index, one) for index, one in GRADIENTS.items()), strict=True)
    return data_frame(runs, parts)


def error_of(call: grpc.RpcError) -> AdashardError:
    """The error of the catalogue in the trailing metadata of a failed call."""
    (value,) = [value for key, value in call.trailing_metadata() if key == ERROR_KEY]
    error = from_info(codec.from_proto(types_pb2.ErrorInfo.FromString(value)))
    assert call.code() is grpc.StatusCode[error.code.name]
    return error


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()
