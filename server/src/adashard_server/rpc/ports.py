"""Where gRPC servers listen, and with which limits."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc import aio

from adashard.transport.grpc import CONTROL_BYTES_MAX
from adashard.wire.errors import PortInUse

OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", CONTROL_BYTES_MAX),
    ("grpc.max_receive_message_length", CONTROL_BYTES_MAX),
    ("grpc.so_reuseport", 0),
)


def listen(server: grpc.Server | aio.Server, bind: str, port: int) -> int:
    """Has a server listen; the port, also where a free one was asked for with 0.

    Raises:
        PortInUse: somebody else listens there.
    """
    try:
        bound = server.add_insecure_port(f"{bind}:{port}")
    except RuntimeError:
        bound = 0
    if not bound:
        raise PortInUse(f"cannot listen on {bind}:{port}", bind=bind, port=port)
    return int(bound)
