"""Reports of other shards."""

from __future__ import annotations

import grpc

from adashard import failpoints
from adashard.wire import codec
from adashard.wire.v1 import peer_pb2
from adashard.wire.v1.peer_pb2_grpc import PeerServiceServicer
from adashard_server.rpc.interceptors import Answering
from adashard_server.shard.shard import Shard


class PeerService(PeerServiceServicer):
    """Hands reports to the shard and its own back."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def Exchange(
        self, request: peer_pb2.ExchangeRequest, context: grpc.ServicerContext
    ) -> peer_pb2.ExchangeResponse:
        """See protos/adashard/wire/v1/peer.proto."""
        with Answering(context, "Exchange"):
            failpoints.reach("report.received")
            response = self._shard.exchange(codec.from_proto(request))
            failpoints.reach("report.answered")
            packed: peer_pb2.ExchangeResponse = codec.to_proto(response)
            return packed
        return peer_pb2.ExchangeResponse()
