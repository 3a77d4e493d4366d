"""The gRPC server of a coordinator."""

from __future__ import annotations

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from adashard.wire.v1.coordinator_pb2_grpc import add_CoordinatorServiceServicer_to_server
from adashard_server.rpc.coordinator_service import CoordinatorService
from adashard_server.rpc.ports import OPTIONS, listen


async def start_coordinator_server(
    service: CoordinatorService, bind: str, port: int
) -> tuple[aio.Server, int]:
    """A started server of the control plane, and the port it listens on.

    Raises:
        PortInUse: somebody else listens there.
    """
    server = aio.server(options=OPTIONS)
    add_CoordinatorServiceServicer_to_server(service, server)
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    bound = listen(server, bind, port)
    await server.start()
    return server, bound
