"""A shard's process: real `Rounds`, with a stand-in for the engine that adds histories."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from tests.sim.clockwork import END, Broken, Loop, Stream, Task
from tests.sim.history import Gradient, History, Step, Sum, Violation
from tests.sim.member import Member

from adashard.wire.control import (
    Freeze,
    FromCoordinator,
    Hello,
    Open,
    Opened,
    Planned,
    PlanRequest,
    Renewal,
    ShardHello,
    Stale,
    Standing,
)
from adashard.wire.errors import AdashardError, StaleGeneration
from adashard.wire.messages import (
    Begin,
    Exchange,
    ExchangeRequest,
    ExchangeResponse,
    Outcome,
    Plan,
    Record,
    Report,
    Run,
    UploadBegin,
)
from adashard.wire.spec import DType
from adashard.wire.version import VERSION
from adashard_server.optim.partials import Partial
from adashard_server.shard.instructions import (
    Add,
    Committed,
    Instruction,
    Measure,
    Send,
    Wait,
)
from adashard_server.shard.partials import Finding, packed, short_count, unpacked
from adashard_server.shard.records import bit
from adashard_server.shard.rounds import Rounds

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

REPEAT_S = 1.0
APPLY_S = 0.03  # between the record and a slice, and from slice to slice, now and then


class SimShard(Member):
    """One shard of one job. Sums hold what was added, in order; weights are their own history."""

    def __init__(self, loop: Loop, name: str, cluster: Cluster) -> None:
        super().__init__(loop, name, cluster)
        self.rounds = Rounds(name)
        self.sums: dict[int, list[Sum]] = {}
        self.weights: dict[int, History | None] = {}
        self._streams: dict[str, Begin] = {}
        self._promised = 0
        self.start(self.every(REPEAT_S, self._repeat))

    # --- the control stream ---------------------------------------------------------------------

    def hello(self) -> Hello:
        shard = ShardHello(address=self.name)
        return Hello(id=self.name, version=VERSION, host="host", pid=1, shard=shard)

    def renewal(self) -> Renewal:
        generation, version = self.rounds.promised, self.rounds.version
        standing = Standing(job=self.cluster.job, generation=generation, version=version)
        return Renewal(standings=(standing,) if generation else ())

    def handle(self, message: FromCoordinator) -> None:
        try:
            match message:
                case Freeze(entry=entry):
                    answer = self.rounds.freeze(entry)
                    if not isinstance(answer, Stale):
                        self._promised = entry.generation
                        self._streams.clear()
                    self.tell(answer)
                case PlanRequest(plan=plan):
                    self.rounds.plan(plan)
                    self._settle_all()
                    self._say_if_planned(plan.entry.generation)
                case Open(plan=plan):
                    self._open(plan)
        except StaleGeneration:
            pass  # it asks again

    def _open(self, plan: Plan) -> None:
        self._carry_out(self.rounds.open(plan))
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
            yield self.loop.rng.choice([0.0, 0.0, APPLY_S])
            self._check_stream(begin)
            yield from self._reply(begin, stream)
            stream.down.send(END)
        except Broken:
            pass
        except AdashardError as error:
            stream.down.send(error)

    def upload(self, stream: Stream) -> Task:
        """Whole slices for a plan."""
        came: dict[int, int] = {}
        try:
            begin = cast(UploadBegin, (yield from stream.up.next()))
            generation = begin.generation
            yield lambda: self._no_upload(begin) or self.rounds.has_plan(generation)
            while (item := (yield from stream.up.next())) != END:
                run, history = cast(tuple[Run, History], item)
                if self._no_upload(begin):
                    raise StaleGeneration("the generation has ended, or is open")
                if not self.rounds.lacks(run.slice, begin.version):
                    continue
                came[run.slice] = came.get(run.slice, 0) + run.count
                whole = came[run.slice] == self._count(run.slice)
                self.weights[run.slice] = history if whole else None
                if whole:
                    self.rounds.uploaded(run.slice, begin.version)
            self._say_if_planned(generation)
            stream.down.send(END)
        except Broken:
            pass
        except AdashardError as error:
            stream.down.send(error)

    def _no_upload(self, begin: UploadBegin) -> bool:
        return begin.generation != self.rounds.promised or self.rounds.opened

    def _begin(self, begin: Begin) -> object:
        if begin.receiver != self.name:
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
        if not isinstance(admission, Add):
            return
        elements = self.sums.setdefault(run.slice, [()] * self._count(run.slice))
        for element in range(admission.start, admission.stop):
            before = () if admission.first else elements[element]
            elements[element] = (*before, gradient)
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
            yield self.loop.rng.choice([0.0, 0.0, APPLY_S])
            self._settle(index)
            self._check_stream(begin)
            if one_behind and not self.rounds.updates(index):
                stream.down.send((Run(slice=index, start=0, count=0, dtype=DType.FLOAT32), None))
                continue
            for run in self.cluster.runs(index):
                self._check_stream(begin)
                stream.down.send((run, self.weights[index]))
                yield self.loop.rng.uniform(0.0, 0.01)
                self._check_stream(begin)

    # --- what the rounds ask for ----------------------------------------------------------------

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Measure():
                    delay_s = self.loop.rng.uniform(0, 0.005)
                    self.after(delay_s, lambda measure=instruction: self._measured(measure))
                case Send(report=report, peers=peers, wanted=wanted):
                    for peer in peers:
                        request = ExchangeRequest(
                            receiver=peer, report=report, wanted=peer in wanted
                        )
                        self.cluster.exchange(self, peer, request)
                case Committed(record=record):
                    self.cluster.trace("%s commits %s", self.name, record)
                    if self.rounds.promised < self._promised:
                        raise Violation(f"{self.name} commits in a generation that it has closed")

    def _measured(self, measure: Measure) -> None:
        findings = {index: self._finding(index, measure) for index in measure.slices}
        self._carry_out(self.rounds.measured(measure, findings))

    def _finding(self, index: int, measure: Measure) -> Finding:
        """Ones in the place of sums: what comes of them counts the slices that were added."""
        finite = all(g.finite for total in self.sums[index] for g in total)
        piece = self.rounds.slices[index]
        square = 1.0 if finite else float("nan")
        if measure.exchange is Exchange.NORM or not piece.split:
            return Finding(square)
        count = short_count(piece) if measure.exchange is Exchange.PARTIALS else 0
        ones = Partial(
            weight_squared_sum=1.0,
            update_squared_sum=1.0,
            least=1.0,
            squares=torch.ones(count),
            ratios=torch.ones(count),
        )
        return Finding(square, packed(index, 1, ones))

    def exchange(self, request: ExchangeRequest) -> ExchangeResponse | None:
        """Another shard's report; None where it is refused."""
        try:
            self._carry_out(self.rounds.exchange(request.report))
        except StaleGeneration:
            return None
        step, exchange = request.report.step, request.report.exchange
        own = self.rounds.own_report(step, exchange) if request.wanted else None
        return ExchangeResponse(report=own)

    def deliver(self, report: Report) -> None:
        """Another shard's answer to the own report."""
        self.exchange(ExchangeRequest(receiver=self.name, report=report))

    def _repeat(self) -> None:
        self._carry_out(self.rounds.repeat())

    def _settle_all(self) -> None:
        for index in sorted(self.rounds.owed):
            self._settle(index)

    def _settle(self, index: int) -> None:
        if self.rounds.owes(index):
            record, history = self.rounds.record, self.weights[index]
            assert record is not None
            if history is None:
                raise Violation(f"{self.name} applies to slice {index}, which is torn")
            self._check_sum(index, record, history)
            step = Step(record.step, record.workers, record.outcome)
            self.weights[index] = history.then(step)
            self.rounds.applied(index)

    def _check_sum(self, index: int, record: Record, history: History) -> None:
        """Every element holds each worker's gradient of this step once, in the record's order."""
        gradients = [self.cluster.gradients[worker, record.step] for worker in record.workers]
        finite = all(g.finite or not any(g.present) for g in gradients)
        if finite != (record.outcome is Outcome.APPLY):
            raise Violation(f"{self.name} ends step {record.step} with {record.outcome.name}")
        if record.step != history.version + 1 or any(g.base != history for g in gradients):
            raise Violation(f"{self.name} applies step {record.step} to {history}: {gradients}")
        parameter = self.rounds.slices[index].parameter
        expected = tuple(g for g in gradients if bit(g.present, parameter))
        if not expected or not finite:
            if self.rounds.updates(index):
                raise Violation(f"{self.name} updates slice {index} without a gradient")
        elif self.rounds.slices[index].split and not self._sums_up(index, record):
            raise Violation(f"{self.name} has not the sums over all of slice {index}: {record}")
        elif any(element != expected for element in self.sums[index]):
            found = {tuple((g.worker, g.step) for g in element) for element in self.sums[index]}
            raise Violation(f"{self.name} slice {index} step {record.step}: the sum holds {found}")

    def _sums_up(self, index: int, record: Record) -> bool:
        """Whether the record has one partial of the slice's parameter, of each slice once."""
        piece = self.rounds.slices[index]
        found = [partial for partial in record.partials if partial.slice == piece.first]
        if len(found) != 1 or found[0].count != piece.count:
            return False
        total = unpacked(found[0])
        elements = {total.weight_squared_sum, total.update_squared_sum, *total.squares.tolist()}
        return elements == {float(piece.count)}

    def _count(self, index: int) -> int:
        return self.rounds.slices[index].element_count
