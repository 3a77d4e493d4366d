"""The transport over gRPC."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar, cast

import grpc

from adashard.wire import codec
from adashard.wire.control import FromCoordinator, FromMember
from adashard.wire.errors import (
    AdashardError,
    CannotReachServer,
    Internal,
    Overloaded,
    ShardUnavailable,
    StaleGeneration,
    StepTimedOut,
    from_info,
)
from adashard.wire.frames import FRAME_BYTES_MAX
from adashard.wire.messages import ErrorInfo, UploadReply
from adashard.wire.v1 import shard_pb2, types_pb2
from adashard.wire.v1.coordinator_pb2_grpc import CoordinatorServiceStub

ERROR_KEY = "adashard-error-bin"
CONTROL_BYTES_MAX = 64 << 20
_SERVICE = "/adashard.wire.v1.ShardService/"
_OPTIONS = [
    ("grpc.max_send_message_length", CONTROL_BYTES_MAX),
    ("grpc.max_receive_message_length", max(CONTROL_BYTES_MAX, FRAME_BYTES_MAX)),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),  # a process that is back is found in no time
    ("grpc.enable_http_proxy", 0),
]

T = TypeVar("T")
Unreachable = Callable[[str, str], AdashardError]


class _Streaming(Protocol):
    """What grpc gives for a stream: an iterator that can be cancelled."""

    def __iter__(self) -> Iterator[Any]: ...
    def cancel(self) -> bool: ...


class GrpcTransport:
    """One channel per address, made when first needed. See `base.Transport`."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = threading.Lock()

    def attend(self, address: str, messages: Iterator[FromMember]) -> _GrpcCall[FromCoordinator]:
        """Opens a control stream."""
        stub = CoordinatorServiceStub(self._channel(address))
        call = stub.Attend(codec.pack(message) for message in messages)
        return _GrpcCall(call, address, codec.unpack, coordinator_unreachable)

    def push_pull(self, address: str, frames: Iterable[bytes]) -> _GrpcCall[bytes]:
        """Opens a stream to a shard."""
        invoke: grpc.StreamStreamMultiCallable[bytes, bytes]
        invoke = self._channel(address).stream_stream(_SERVICE + "PushPull")
        return _GrpcCall(cast(_Streaming, invoke(iter(frames))), address, bytes, shard_unreachable)

    def upload(self, address: str, frames: Iterable[bytes]) -> UploadReply:
        """Sends whole slices to a shard."""
        invoke: grpc.StreamUnaryMultiCallable[bytes, shard_pb2.UploadReply]
        invoke = self._channel(address).stream_unary(
            _SERVICE + "Upload", response_deserializer=shard_pb2.UploadReply.FromString
        )
        try:
            reply = codec.from_proto(invoke(iter(frames)))
        except grpc.RpcError as error:
            raise translate(error, address, shard_unreachable) from None
        assert isinstance(reply, UploadReply)
        return reply

    def close(self) -> None:
        """Ends everything under way."""
        with self._lock:
            channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()

    def _channel(self, address: str) -> grpc.Channel:
        with self._lock:
            if address not in self._channels:
                self._channels[address] = grpc.insecure_channel(address, options=_OPTIONS)
            return self._channels[address]


class _GrpcCall(Generic[T]):
    """A stream under way, with its errors in words of the catalogue."""

    def __init__(
        self,
        call: _Streaming,
        address: str,
        read: Callable[[Any], T],
        unreachable: Unreachable,
    ) -> None:
        self._call, self._address, self._read = call, address, read
        self._unreachable = unreachable

    def __iter__(self) -> Iterator[T]:
        try:
            for message in self._call:
                yield self._read(message)
        except grpc.RpcError as error:
            raise translate(error, self._address, self._unreachable) from None

    def cancel(self) -> None:
        self._call.cancel()


def translate(error: grpc.RpcError, address: str, unreachable: Unreachable) -> AdashardError:
    """The class of the catalogue for what grpc raises."""
    metadata = cast(Iterable[tuple[str, bytes]], error.trailing_metadata() or ())
    for key, value in metadata:
        if key == ERROR_KEY:
            info = codec.from_proto(types_pb2.ErrorInfo.FromString(value))
            assert isinstance(info, ErrorInfo)
            return from_info(info)
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return unreachable(address, error.details() or "")
        case grpc.StatusCode.CANCELLED:
            return StaleGeneration(f"the call to {address} was ended from this side")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return StepTimedOut(f"no answer from {address}")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(f"{address} refuses: {error.details()}")
        case code:
            return Internal(f"{address} answered {code.name}: {error.details()}")


def coordinator_unreachable(address: str, details: str) -> AdashardError:
    """Nobody answers at the coordinator's address."""
    return CannotReachServer(f"no adashard server at {address} ({details})", address=address)


def shard_unreachable(address: str, details: str) -> AdashardError:
    """Nobody answers at a shard's address."""
    return ShardUnavailable(f"no shard at {address} ({details})", address=address)
