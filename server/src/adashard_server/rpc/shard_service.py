"""The shard's data plane: frames in, frames out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TypeVar

import grpc

from adashard import failpoints
from adashard.wire import codec
from adashard.wire.errors import InvalidFrame, Overloaded
from adashard.wire.frames import Frame, leading_frame, read_frame
from adashard.wire.messages import Begin, UploadBegin, UploadReply
from adashard_server.rpc.interceptors import Answering
from adashard_server.shard.engine import Engine
from adashard_server.shard.shard import Shard

STREAMS_MAX = 192
T = TypeVar("T", Begin, UploadBegin)


class ShardService:
    """Serves one shard's streams, each in its own thread.

    At most `STREAMS_MAX` streams are served at once, so that threads remain for the reports of
    other shards, without which no stream would ever end.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._places = threading.BoundedSemaphore(STREAMS_MAX)

    def handler(self) -> grpc.GenericRpcHandler:
        """The service, on bytes: frames are written and read by hand."""
        return grpc.method_handlers_generic_handler(
            "adashard.wire.v1.ShardService",
            {
                "PushPull": grpc.stream_stream_rpc_method_handler(self.push_pull),
                "Upload": grpc.stream_unary_rpc_method_handler(self.upload),
            },
        )

    def push_pull(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """One step of one worker: gradient in, record and weights out."""
        with Answering(context, "PushPull"), self._place():
            begin = _leading(requests, Begin)
            engine = self._shard.begin(begin)
            yield leading_frame(engine.begin(begin))
            self._receive(requests, context, begin, engine)
            record = engine.wait_decided(begin, context.is_active)
            if record is not None:
                failpoints.reach("reply.record")
                yield leading_frame(record)
            for frame in engine.reply(begin, context.is_active):
                failpoints.reach("reply.frame")
                yield frame
            failpoints.reach("reply.end")

    def upload(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Whole slices for a plan."""
        with Answering(context, "Upload"), self._place():
            begin = _leading(requests, UploadBegin)
            engine = self._shard.upload(begin)
            upload = engine.upload(begin, context.is_active)
            done = False
            for data in requests:
                failpoints.reach("upload.received")
                for run, buffer in _data(data).pieces():
                    done = engine.upload_piece(upload, run, buffer)
            self._shard.uploaded(begin, done)
            reply = UploadReply(slice_count=upload.slice_count)
            return bytes(codec.to_proto(reply).SerializeToString())
        return b""

    def _receive(
        self,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        begin: Begin,
        engine: Engine,
    ) -> None:
        for data in requests:
            if not begin.push:
                raise InvalidFrame("a pull carries no gradients")
            failpoints.reach("add.before")
            for run, buffer in _data(data).pieces():
                engine.push(begin, run, buffer, context.is_active)
            failpoints.reach("add.after")

    def _place(self) -> _Place:
        return _Place(self._places)


class _Place:
    """One of the streams that may be served at once."""

    def __init__(self, places: threading.BoundedSemaphore) -> None:
        self._places = places

    def __enter__(self) -> None:
        if not self._places.acquire(blocking=False):
            raise Overloaded(f"the shard serves {STREAMS_MAX} streams, the most at once")

    def __exit__(self, *_: object) -> None:
        self._places.release()


def _leading(requests: Iterator[bytes], kind: type[T]) -> T:
    data = next(requests, None)
    message = read_frame(data).leading if data is not None else None
    if not isinstance(message, kind):
        raise InvalidFrame(f"a stream begins with {kind.__name__}, not {type(message).__name__}")
    return message


def _data(data: bytes) -> Frame:
    frame = read_frame(data)
    if frame.leading is not None:
        raise InvalidFrame(f"{type(frame.leading).__name__} comes first or not at all")
    return frame
