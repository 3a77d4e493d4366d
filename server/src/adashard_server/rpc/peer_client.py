"""The exchange between shards over gRPC."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence

import grpc

from adashard import failpoints
from adashard.transport.grpc import CONTROL_BYTES_MAX, shard_unreachable, translate
from adashard.transport.links import Links
from adashard.wire import codec
from adashard.wire.errors import AdashardError, ShardUnavailable, StepTimedOut
from adashard.wire.messages import Member, Report
from adashard.wire.v1 import peer_pb2
from adashard.wire.v1.peer_pb2_grpc import PeerServiceStub

log = logging.getLogger("adashard.rounds")

EXCHANGE_TIMEOUT_S = 10.0
_OPTIONS = [
    ("grpc.max_send_message_length", CONTROL_BYTES_MAX),
    ("grpc.max_receive_message_length", CONTROL_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_http_proxy", 0),
]


class GrpcExchange:
    """A `PeerExchange` with one channel per address; thread-safe.

    Args:
        links: is told which peers answer.
    """

    def __init__(self, links: Links) -> None:
        self._links = links
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = threading.Lock()

    def send(
        self,
        report: Report,
        peers: Sequence[Member],
        wanted: Collection[str],
        deliver: Callable[[Report], None],
    ) -> None:
        """Hands a report to each of the peers; see `PeerExchange.send`."""
        packed = codec.to_proto(report)
        for peer in peers:
            asked = report.job, report.generation, report.step, report.exchange
            self._links.asked(peer.id, asked)
            self._send(packed, peer, deliver, wanted=peer.id in wanted)

    def close(self) -> None:
        """Ends what is under way."""
        with self._lock:
            channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()

    def _send(
        self,
        report: peer_pb2.Report,
        peer: Member,
        deliver: Callable[[Report], None],
        *,
        wanted: bool,
    ) -> None:
        stub = PeerServiceStub(self._channel(peer.address))
        request = peer_pb2.ExchangeRequest(receiver=peer.id, report=report, wanted=wanted)
        for one in failpoints.copies("report.sent", request):
            call = stub.Exchange.future(one, timeout=EXCHANGE_TIMEOUT_S)
            call.add_done_callback(lambda done: self._answered(done, peer, deliver))

    def _answered(
        self,
        call: grpc.Future[peer_pb2.ExchangeResponse],
        peer: Member,
        deliver: Callable[[Report], None],
    ) -> None:
        if call.cancelled():
            return
        error = call.exception()
        if isinstance(error, grpc.RpcError):
            what = translate(error, peer.address, shard_unreachable)
            self._heard(peer, what)
            log.debug("a report to shard %s is repeated: %s", peer.id, what.message)
            return
        self._heard(peer, None)
        response = codec.from_proto(call.result())
        if response.report is not None:
            deliver(response.report)

    def _heard(self, peer: Member, error: AdashardError | None) -> None:
        """A refusal is an answer as good as any: the peer has been reached."""
        if isinstance(error, ShardUnavailable | StepTimedOut):
            self._links.dropped(peer.id)
        else:
            self._links.answered(peer.id)

    def _channel(self, address: str) -> grpc.Channel:
        with self._lock:
            if address not in self._channels:
                self._channels[address] = grpc.insecure_channel(address, options=_OPTIONS)
            return self._channels[address]
