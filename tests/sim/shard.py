"""A shard's process: real `Rounds`, with a stand-in for the engine that adds histories."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from tests.sim.clockwork import Task
from tests.sim.disk import SimSnapshots
from tests.sim.history import Gradient, Violation, Weights
from tests.sim.member import Member
from tests.sim.network import END, Broken, Stream
from tests.sim.slices import SimSlices

from adashard.wire.control import (
    Bye,
    Freeze,
    FromCoordinator,
    Hello,
    Open,
    Opened,
    Planned,
    PlanRequest,
    Renewal,
    ShardHello,
    SnapshotRequest,
    Stale,
    Standing,
)
from adashard.wire.errors import AdashardError, InvalidFrame, StaleGeneration
from adashard.wire.messages import (
    Begin,
    ExchangeRequest,
    ExchangeResponse,
    Plan,
    Report,
    Run,
    UploadBegin,
)
from adashard.wire.spec import DType
from adashard.wire.version import VERSION
from adashard_server.shard.instructions import (
    Add,
    Committed,
    Degraded,
    Instruction,
    Measure,
    Send,
    Wait,
)
from adashard_server.shard.rounds import Rounds

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

REPEAT_S = 1.0
CALL_S = 0.9  # after which a call to another shard has failed


class SimShard(Member):
    """One shard of one job. Sums hold what was added, in order; weights are their own history."""

    def __init__(self, name: str, cluster: Cluster) -> None:
        super().__init__(name, cluster)
        self.rounds = Rounds(name)
        self.slices = SimSlices(name, cluster.truth)
        self.snapshots = SimSnapshots(self)
        self._streams: dict[str, Begin] = {}
        self._promised = 0
        self.start(self.every(REPEAT_S, self._repeat))

    def copies(self) -> dict[int, Weights]:
        held = self.slices.weights
        return {index: held[index] for index in self.rounds.versions}

    # --- the control stream ---------------------------------------------------------------------

    def hello(self) -> Hello:
        shard = ShardHello(address=self.name)
        return Hello(
            id=self.name, version=VERSION, host="host", pid=1, shard=shard, entries=self.entries()
        )

    def renewal(self) -> Renewal:
        generation, version = self.rounds.promised, self.rounds.version
        standing = Standing(job=self.cluster.job, generation=generation, version=version)
        standings = (standing,) if generation else ()
        return Renewal(standings=standings, broken_links=self.links.broken())

    def handle(self, message: FromCoordinator) -> None:
        try:
            match message:
                case Freeze():
                    self._freeze(message)
                case PlanRequest(plan=plan):
                    self._plan(plan)
                case Open(plan=plan):
                    self._open(plan)
                case SnapshotRequest():
                    self.start(self.snapshots.run(message))
                case Bye(job=job):
                    self._left_out(whole=not job)
        except StaleGeneration:
            pass  # it asks again

    def _left_out(self, *, whole: bool) -> None:
        """The job goes on without this shard: it begins anew, as a process if `whole`."""
        self.cluster.saw("a shard is told that it was left out")
        if whole:
            self.kill()
            self.cluster.clock.after(0.5, self.cluster.begin_shard)
        else:
            self.rounds, self.entry = Rounds(self.name), None
            self.slices = SimSlices(self.name, self.cluster.truth)
            self.snapshots.void()
            self._streams.clear()

    def _freeze(self, freeze: Freeze) -> None:
        answer = self.rounds.freeze(freeze.entry)
        if not isinstance(answer, Stale):
            self._promised = freeze.entry.generation
            self.entry = freeze.entry
            self._streams.clear()
            self.snapshots.void()
            if self.rounds.owed:
                self.cluster.saw("frozen in the middle of a commit")
        self.tell(answer)
        self.cluster.reached("freeze answered", self)

    def _plan(self, plan: Plan) -> None:
        self.rounds.plan(plan)
        self._settle_all()
        self._restore(plan)
        self.cluster.changed = True
        self._say_if_planned(plan.entry.generation)

    def _restore(self, plan: Plan) -> None:
        """Reads what the lineage's checkpoint supplies."""
        lineage, disk = plan.entry.lineage, self.cluster.disk
        for source in plan.sources:
            index = source.slice
            here = not source.member and index in self.rounds.mine
            if lineage and here and self.rounds.lacks(index, source.version):
                self.slices.weights[index] = disk.restored(lineage, index)
                self.rounds.uploaded(index, source.version)

    def _open(self, plan: Plan) -> None:
        self._carry_out(self.rounds.open(plan))
        self.entry = plan.entry
        self.cluster.promises.sums(self.rounds)
        self.tell(Opened(job=self.cluster.job, generation=plan.entry.generation))

    def _say_if_planned(self, generation: int) -> None:
        if self.rounds.planned:
            self.tell(Planned(job=self.cluster.job, generation=generation))

    # --- streams of workers ---------------------------------------------------------------------

    def push_pull(self, stream: Stream) -> Task:
        """One step of one worker."""
        try:
            begin = cast(Begin, (yield from stream.up.next()))
            stream.down.send(self._begin(begin))
            while (item := (yield from stream.up.next())) != END:
                run, gradient = cast(tuple[Run, Gradient], item)
                yield from self._push(begin, run, gradient)
            yield lambda: self._over(begin) or self.rounds.version >= begin.step
            self._check_stream(begin)
            if self.rounds.record is not None:
                stream.down.send(self.rounds.record)
            yield self.loop.rng.choice([0.0, self.cluster.apply_s])
            yield from self._reply(begin, stream)
            stream.down.send(END)
        except Broken:
            pass
        except AdashardError as error:
            stream.down.send(error)

    def _begin(self, begin: Begin) -> object:
        if begin.receiver != self.name or self.rounds.entry is None:
            raise StaleGeneration(f"{begin.receiver} is not here")
        if begin.push and begin.step == self.rounds.version + 1:
            self._settle_all()
        acknowledge, instructions = self.rounds.begin(begin)
        self._streams[begin.sender] = begin
        self._carry_out(instructions)
        return acknowledge

    def _push(self, begin: Begin, run: Run, gradient: Gradient) -> Task:
        yield lambda: self._over(begin) or not isinstance(self._admit(begin, run), Wait)
        self._check_stream(begin)
        admission = self._admit(begin, run)
        if isinstance(admission, Add):
            self.slices.add(run.slice, admission, gradient)
            self._carry_out(self.rounds.added(begin, run.slice, admission.stop))

    def _admit(self, begin: Begin, run: Run) -> Add | Wait | None:
        return self.rounds.admit(begin, run.slice, run.start, run.count)

    def _over(self, begin: Begin) -> bool:
        """Whether the generation or the stream has ended."""
        try:
            self._check_stream(begin)
        except StaleGeneration:
            return True
        return False

    def _check_stream(self, begin: Begin) -> None:
        self.rounds.check(begin.generation, begin.sender)
        if self._streams.get(begin.sender) is not begin:
            raise StaleGeneration("a newer stream has taken over")

    def _reply(self, begin: Begin, stream: Stream) -> Task:
        """Weights at the step, slice by slice, each as soon as it has taken the step."""
        wanted = [i for i in self.rounds.mine if not begin.slices or i in begin.slices]
        one_behind = begin.version >= 0 and begin.version == begin.step - 1
        for index in wanted:
            yield self.loop.rng.choice([0.0, self.cluster.apply_s])
            yield lambda index=index: self._over(begin) or not self.rounds.awaits(index)
            self._check_stream(begin)
            self.settle(index)
            if one_behind and not self.rounds.updates(index):
                stream.down.send((Run(slice=index, start=0, count=0, dtype=DType.FLOAT32), None))
                continue
            for run in self.cluster.runs(index):
                self._check_stream(begin)
                stream.down.send((run, self.slices.weights[index]))
                yield self.loop.rng.uniform(0.0, 0.01)
                self._check_stream(begin)
            self.cluster.reached("reply", self)

    # --- copies from elsewhere ------------------------------------------------------------------

    def upload(self, stream: Stream) -> Task:
        """Whole slices for a plan."""
        came: dict[int, list[Weights]] = {}
        try:
            begin = cast(UploadBegin, (yield from stream.up.next()))
            yield lambda: self._no_upload(begin) or self.rounds.has_plan(begin.generation)
            while (item := (yield from stream.up.next())) != END:
                run, weights, checksum = cast(tuple[Run, Weights, Weights], item)
                if self._no_upload(begin):
                    raise StaleGeneration("the generation has ended, or is open")
                elements = came.setdefault(run.slice, [])
                elements += [weights] * run.count
                if len(elements) == self.rounds.slices[run.slice].element_count:
                    if not self.intact(elements, checksum):
                        raise InvalidFrame("these weights have another checksum")
                    self._uploaded(begin, run.slice, weights)
            self._say_if_planned(begin.generation)
            stream.down.send(END)
        except Broken:
            pass
        except AdashardError as error:
            stream.down.send(error)

    def intact(self, elements: list[Weights], checksum: Weights) -> bool:
        """Whether what came is what the sender had got with this checksum."""
        return set(elements) == {checksum}

    def _uploaded(self, begin: UploadBegin, index: int, weights: Weights) -> None:
        if weights.version != begin.version:
            raise Violation(f"{begin.sender} uploads {weights} as version {begin.version}")
        if self.rounds.lacks(index, begin.version):
            self.slices.weights[index] = weights
            self.rounds.uploaded(index, begin.version)
            self.cluster.changed = True
            self.cluster.reached("upload received", self)

    def _no_upload(self, begin: UploadBegin) -> bool:
        wrong = begin.receiver != self.name or begin.generation != self.rounds.promised
        return wrong or self.rounds.opened

    # --- what the rounds ask for ----------------------------------------------------------------

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Measure():
                    delay_s = self.loop.rng.uniform(0, 0.005)
                    self.after(delay_s, lambda measure=instruction: self._measured(measure))
                case Send(report=report, peers=peers, wanted=wanted):
                    self.cluster.reached("report", self)
                    for peer in peers:
                        self._send(peer, report, wanted=peer in wanted)
                case Committed(record=record):
                    self.cluster.trace("%s commits %s", self.name, record)
                    if self.rounds.promised < self._promised:
                        raise Violation(f"{self.name} commits in a generation that it has closed")
                    self.snapshots.committed(record)
                    self.cluster.reached("commit", self)
                case Degraded():
                    self.cluster.degraded(self, instruction)

    def _measured(self, measure: Measure) -> None:
        if self.rounds.wants(measure):
            found = {one: self.slices.measure(one, measure.exchange) for one in measure.slices}
            self._carry_out(self.rounds.measured(measure, found))

    def _send(self, peer: str, report: Report, *, wanted: bool) -> None:
        """A report goes to another shard, and perhaps the other's comes back."""
        receiver, network = self.cluster.shards[peer], self.cluster.network
        request = ExchangeRequest(receiver=peer, report=report, wanted=wanted)
        self.links.asked(peer, (report.generation, report.step, report.exchange))
        self.after(CALL_S, lambda: self.links.dropped(peer))

        def answer() -> None:
            response = receiver.exchange(request)
            own = response.report if response else None
            network.call(receiver, self, lambda: self._answered(peer, own))

        network.call(self, receiver, answer)

    def _answered(self, peer: str, own: Report | None) -> None:
        """Another shard has heard this one's report, and perhaps told its own."""
        self.links.answered(peer)
        if own is not None:
            self.exchange(ExchangeRequest(receiver=self.name, report=own))

    def exchange(self, request: ExchangeRequest) -> ExchangeResponse | None:
        """Another shard's report; None where it is refused."""
        try:
            self._carry_out(self.rounds.exchange(request.report))
        except StaleGeneration:
            return None
        step, exchange = request.report.step, request.report.exchange
        own = self.rounds.own_report(step, exchange) if request.wanted else None
        return ExchangeResponse(report=own)

    def _repeat(self) -> None:
        self._carry_out(self.rounds.repeat())

    def _settle_all(self) -> None:
        for index in self.rounds.payable:
            self.settle(index)

    def settle(self, index: int) -> None:
        """Has a slice take the step that it owes, if it owes one now."""
        if self.rounds.owes(index):
            member = self.cluster.is_member(self.name)
            self.snapshots.take(index)
            self.slices.apply(index, self.rounds, member=member)
            self.rounds.applied(index)
            self.cluster.changed = True
            if self.rounds.owed:
                self.cluster.reached("part of a commit", self)
