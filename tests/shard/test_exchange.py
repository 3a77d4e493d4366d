"""Reports between shards: the same promises in memory and over gRPC."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.shard import jobs
from tests.shard.tables import Table, push, talked

from adashard.transport.links import Links
from adashard.wire.messages import Member, Report
from adashard_server.rpc.peer_client import GrpcExchange
from adashard_server.rpc.shard_server import start_shard_server
from adashard_server.shard.exchange import MemoryExchange, PeerExchange

SPEC = jobs.spec((4,), (3,))
WEIGHTS = {0: torch.ones(4), 1: torch.ones(3)}
GRADIENTS = {0: torch.arange(4.0), 1: torch.arange(3.0)}
NAMES = ("s0", "s1")


class Peers:
    """Two shards of one job that reach each other, and how a third process would send to them."""

    def __init__(self, exchange: PeerExchange, serve: Callable[[Table], list[Member]]) -> None:
        self.exchange = exchange
        self.table = Table(NAMES, exchange)
        self.members = serve(self.table)
        self.plan = jobs.plan(jobs.entry(SPEC, shards=self.members, placement=(0, 1)))
        self.table.open(self.plan, WEIGHTS)
        self.delivered: queue.Queue[Report] = queue.Queue()

    def report(self, *, generation: int = 1, step: int = 1) -> Report:
        return Report(
            job=jobs.JOB,
            generation=generation,
            sender="s0",
            step=step,
            workers=("a",),
            finite=True,
            slices=(0,),
            squared_sums=(1.0,),
        )

    def send(self, *, to: int = 1, wanted: bool = True, **options) -> None:
        member = self.members[to]
        whose = {member.id} if wanted else set()
        self.exchange.send(self.report(**options), [member], whose, self.delivered.put)

    def fill(self, name: str) -> None:
        """The round of one shard becomes full: it reports."""
        mine = {i: g for i, g in GRADIENTS.items() if self.table.owner(i) == name}
        engine = self.table.engine(name)
        begin = jobs.begin(self.table.entry, "a", receiver=name, version=0)
        engine.begin(begin)
        push(engine, begin, mine)


@pytest.fixture(params=["memory", "grpc"])
def peers(request) -> Iterator[Peers]:
    servers = []

    def serve(table: Table) -> list[Member]:
        if request.param == "memory":
            return [Member(id=name) for name in NAMES]
        started = [start_shard_server(shard, "127.0.0.1", 0) for shard in table.shards.values()]
        servers.extend(server for server, _ in started)
        return [
            Member(id=name, address=f"127.0.0.1:{port}")
            for name, (_, port) in zip(NAMES, started, strict=True)
        ]

    exchange = (
        MemoryExchange() if request.param == "memory" else GrpcExchange(Links(time.monotonic))
    )
    yield Peers(exchange, serve)
    exchange.close()
    for server in servers:
        server.stop(None).wait()


class TestExchange:
    def test_a_step_is_decided_on_both_shards(self, peers):
        begin = jobs.begin(peers.table.entry, "a", version=0)
        reply = peers.table.step(begin, GRADIENTS)
        assert sorted(reply.weights) == [0, 1]
        other = talked(peers.table.shards["s1"], jobs.begin(peers.table.entry, "a", receiver="s1"))
        assert other.record == reply.record

    def test_the_own_report_comes_back_where_it_is_wanted(self, peers):
        peers.fill("s1")
        peers.send()
        report = peers.delivered.get(timeout=60)
        assert (report.sender, report.step, report.slices) == ("s1", 1, (1,))

    def test_it_comes_back_after_the_commit_as_well(self, peers):
        peers.table.step(jobs.begin(peers.table.entry, "a", version=0), GRADIENTS)
        peers.send()
        assert peers.delivered.get(timeout=60).sender == "s1"

    def test_what_is_not_wanted_does_not_come_back(self, peers):
        peers.fill("s1")
        peers.send(wanted=False)
        peers.send()
        assert peers.delivered.get(timeout=60).sender == "s1"
        assert peers.delivered.empty()

    @pytest.mark.parametrize("generation", [0, 2])
    def test_a_refusal_is_survived_in_silence(self, peers, generation):
        peers.fill("s1")
        peers.send(generation=generation)
        peers.send()
        assert peers.delivered.get(timeout=60).generation == 1
        assert peers.delivered.empty()

    def test_a_peer_that_nobody_reaches_is_survived_in_silence(self, peers):
        nobody = Member(id="s7", address="127.0.0.1:1")
        peers.exchange.send(peers.report(), [nobody], {"s7"}, peers.delivered.put)
        peers.fill("s1")
        peers.send()
        assert peers.delivered.get(timeout=60).sender == "s1"
        assert peers.delivered.empty()

    def test_a_report_that_is_doubled_changes_nothing(self, peers):
        for _ in range(3):
            peers.send()
        peers.fill("s1")
        peers.send()
        peers.delivered.get(timeout=60)
        assert peers.table.engine("s1").version == 1

    def test_closing_twice_is_one_end(self, peers):
        peers.exchange.close()
        peers.exchange.close()
