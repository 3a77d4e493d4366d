"""gRPC servers with our limits, listening where they were told to."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from adashard.transport.grpc import CONTROL_BYTES_MAX
from adashard.wire.errors import PortInUse
from adashard.wire.v1.coordinator_pb2_grpc import add_CoordinatorServiceServicer_to_server
from adashard.wire.v1.peer_pb2_grpc import add_PeerServiceServicer_to_server
from adashard_server.rpc.coordinator_service import CoordinatorService
from adashard_server.rpc.peer_service import PeerService
from adashard_server.rpc.shard_service import STREAMS_MAX, ShardService
from adashard_server.shard.shard import Shard

THREADS_MAX = STREAMS_MAX + 64  # reports of other shards and health checks need some, too
_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", CONTROL_BYTES_MAX),
    ("grpc.max_receive_message_length", CONTROL_BYTES_MAX),
    ("grpc.so_reuseport", 0),
)


def shard_server(shard: Shard, bind: str, port: int) -> tuple[grpc.Server, int]:
    """A started server of a shard's data plane, and the port it listens on.

    Raises:
        PortInUse: somebody else listens there.
    """
    server = grpc.server(ThreadPoolExecutor(THREADS_MAX, "adashard-rpc"), options=_OPTIONS)
    server.add_generic_rpc_handlers((ShardService(shard).handler(),))
    add_PeerServiceServicer_to_server(PeerService(shard), server)
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    bound = _listen(server, bind, port)
    server.start()
    return server, bound


async def coordinator_server(
    service: CoordinatorService, bind: str, port: int
) -> tuple[aio.Server, int]:
    """A started server of the control plane, and the port it listens on.

    Raises:
        PortInUse: somebody else listens there.
    """
    server = aio.server(options=_OPTIONS)
    add_CoordinatorServiceServicer_to_server(service, server)
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    bound = _listen(server, bind, port)
    await server.start()
    return server, bound


def _listen(server: grpc.Server | aio.Server, bind: str, port: int) -> int:
    try:
        bound = server.add_insecure_port(f"{bind}:{port}")
    except RuntimeError:
        bound = 0
    if not bound:
        raise PortInUse(f"cannot listen on {bind}:{port}", bind=bind, port=port)
    return int(bound)
