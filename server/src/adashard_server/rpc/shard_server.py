"""The gRPC server of a shard."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from adashard.wire.v1.peer_pb2_grpc import add_PeerServiceServicer_to_server
from adashard_server.rpc.peer_service import PeerService
from adashard_server.rpc.ports import OPTIONS, listen
from adashard_server.rpc.shard_service import STREAMS_MAX, ShardService
from adashard_server.shard.shard import Shard

THREADS_MAX = STREAMS_MAX + 64  # reports of other shards and health checks need some, too


def start_shard_server(shard: Shard, bind: str, port: int) -> tuple[grpc.Server, int]:
    """A started server of a shard's data plane, and the port it listens on.

    Raises:
        PortInUse: somebody else listens there.
    """
    server = grpc.server(ThreadPoolExecutor(THREADS_MAX, "adashard-rpc"), options=OPTIONS)
    server.add_generic_rpc_handlers((ShardService(shard).handler(),))
    add_PeerServiceServicer_to_server(PeerService(shard), server)
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    bound = listen(server, bind, port)
    server.start()
    return server, bound
