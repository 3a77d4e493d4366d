"""What goes wrong in steps: records, sums, gradients and copies."""

from __future__ import annotations

from tests.sim.history import Weights
from tests.sim.mutants import Patch, mutant
from tests.sim.shard import SimShard
from tests.sim.talks import Reading, Talk, Talks
from tests.sim.uploads import Uploads

from adashard.wire.control import Frozen, Stale
from adashard.wire.messages import Begin, Entry, Exchange, Plan, Report, Run
from adashard.worker import Worker
from adashard_server.shard.instructions import Add, Admission, Wait
from adashard_server.shard.rounds import Rounds
from adashard_server.shard.sums import Sums

# --- the record, and who knows it ----------------------------------------------------------------


@mutant("shards")
def the_exchange_is_kept_by_shards_only(patch: Patch) -> None:
    """S7, W6: the record rides in replies, and workers answer a freeze with it."""
    patch.setattr(Worker, "_record_of", lambda self, version: None)


@mutant("joins")
def the_record_is_forgotten_at_the_commit(patch: Patch) -> None:
    """S7: the record of t is kept until that of t+1 replaces it."""
    patch.setattr(Rounds, "_record_of", lambda self, version: None)


@mutant("network")
def the_own_report_is_forgotten_at_the_commit(patch: Patch) -> None:
    """S6: another shard may still need it; one lost message is enough."""
    own_report = Rounds.own_report

    def forget(self: Rounds, step: int, exchange: Exchange) -> Report | None:
        return own_report(self, step, exchange) if self.version < step else None

    patch.setattr(Rounds, "own_report", forget)


@mutant("joins")
def a_record_outlives_its_generation(patch: Patch) -> None:
    """W2: the record of a commit that was undone came with the reply, and is void."""
    open_ = Worker.open

    def remember(self: Worker, plan: Plan) -> bool:
        incoming = self._incoming
        opened = open_(self, plan)
        self._incoming = incoming
        return opened

    patch.setattr(Worker, "open", remember)


@mutant("joins")
def a_commit_that_nobody_saw_is_kept(patch: Patch) -> None:
    """S2: a step that no slice anywhere has taken is formed again, with the workers of now."""
    plan_ = Rounds.plan

    def keep(self: Rounds, plan: Plan) -> None:
        owed, record = set(self._owed), self.record
        plan_(self, plan)
        if owed and not self._owed and not self.opened:
            self._owed, self.record = owed, record

    patch.setattr(Rounds, "plan", keep)


# --- promises ------------------------------------------------------------------------------------


@mutant("joins")
def a_worker_is_not_bound_by_its_answer(patch: Patch) -> None:
    """W2: from its answer on, a worker ignores replies of older generations."""
    freeze, open_ = Worker.freeze, Worker.open

    def answer_and_go_on(self: Worker, entry: Entry) -> Frozen | Stale:
        before = self.plan
        answer = freeze(self, entry)
        self.plan = before
        return answer

    def open_all_the_same(self: Worker, plan: Plan) -> bool:
        if plan.entry.generation == self.promised and plan != self.plan:
            self.plan = None
        return open_(self, plan)

    patch.setattr(Worker, "freeze", answer_and_go_on)
    patch.setattr(Worker, "open", open_all_the_same)


@mutant("joins")
def a_shard_is_not_bound_by_its_answer(patch: Patch) -> None:
    """S1: from its answer on, a shard accepts nothing of an older generation."""
    freeze, plan_ = Rounds.freeze, Rounds.plan

    def answer_and_go_on(self: Rounds, entry: Entry) -> Frozen | Stale:
        kept = ("entry", "promised", "opened", "_plan", "_held")
        before = {name: getattr(self, name) for name in kept}
        answer = freeze(self, entry)
        if before["opened"]:
            for name, value in before.items():
                setattr(self, name, value)
        return answer

    def plan_all_the_same(self: Rounds, plan: Plan) -> None:
        freeze(self, plan.entry)
        plan_(self, plan)

    patch.setattr(Rounds, "freeze", answer_and_go_on)
    patch.setattr(Rounds, "plan", plan_all_the_same)


# --- sums and gradients --------------------------------------------------------------------------


@mutant("workers")
def sums_survive_whatever_is_in_them(patch: Patch) -> None:
    """S4: only what is a prefix of the new list, in rank order, may be kept."""
    patch.setattr(Sums, "keep_prefix", lambda self, index, order: None)


@mutant("joins")
def sums_are_not_formed_in_rank_order(patch: Patch) -> None:
    """G2, S5: an early arrival waits."""
    admit = Rounds.admit

    def admit_at_once(
        self: Rounds, begin: Begin, index: int, start: int, count: int, *, ahead: int = 0
    ) -> Admission:
        admission = admit(self, begin, index, start, count)
        if not isinstance(admission, Wait):
            return admission
        nobody = all(self.sums.progress(worker, index) == 0 for worker in self.order)
        return Add(start, start + count, first=nobody)

    patch.setattr(Rounds, "admit", admit_at_once)


@mutant("network")
def a_repeated_stream_is_added_again(patch: Patch) -> None:
    """S5: what is in the sum is skipped, up to the element that it has come to."""
    admit = Rounds.admit

    def admit_again(
        self: Rounds, begin: Begin, index: int, start: int, count: int, *, ahead: int = 0
    ) -> Admission:
        admission = admit(self, begin, index, start, count)
        again = admission is None and begin.step > self.version
        return Add(start, start + count, first=False) if again else admission

    patch.setattr(Rounds, "admit", admit_again)
    patch.setattr(Sums, "progress_of", lambda self, worker: ())


@mutant("network")
def a_second_gradient_has_the_same_name(patch: Patch) -> None:
    """W5: a push is one gradient for ever; a repeated one is the same, bit for bit."""
    repeat = Talks._stream

    def compute_again(self: Talks, talk: Talk) -> object:
        if talk.begun and talk.gradient is not None:
            talk.gradient = talk.gradient._replace(number=talk.gradient.number + 1)
        return repeat(self, talk)

    patch.setattr(Talks, "_stream", compute_again)


@mutant("shards")
def a_joiner_is_counted_in_a_decided_step(patch: Patch) -> None:
    """G4, S3: the workers of a step that somebody has decided are those of its record."""
    patch.setattr(Rounds, "_order", lambda self, index: self.order)


@mutant("joins")
def a_joiner_waits_for_the_step_after(patch: Patch) -> None:
    """G4, W4: all workers of a generation make its first new step, or nobody does."""
    owes = Worker.owes

    def wait(self: Worker, plan: Plan, indices: list[int], step: int) -> list[int]:
        took = plan.record is None or self.id in plan.record.workers
        return owes(self, plan, indices, step) if took or step > plan.base + 1 else []

    patch.setattr(Worker, "owes", wait)


@mutant("shards")
def nobody_pushes_for_a_decided_step(patch: Patch) -> None:
    """W4: a slice that nobody has at the base takes the base step again, from pushes."""
    owes = Worker.owes

    def owe_the_next(self: Worker, plan: Plan, indices: list[int], step: int) -> list[int]:
        return owes(self, plan, indices, step) if step > plan.base else []

    patch.setattr(Worker, "owes", owe_the_next)


# --- copies --------------------------------------------------------------------------------------


@mutant("network")
def a_copy_is_torn_by_a_broken_reply(patch: Patch) -> None:
    """W6: weights, state and version of a slice are replaced as one, when all has come."""
    take = Talks._take

    def take_at_once(
        self: Talks, reading: Reading, begin: Begin, run: Run, weights: Weights | None
    ) -> None:
        if run.count and not reading.coming.get(run.slice):
            self._worker.worker.arrived(run.slice, begin.step)
            self._worker.cluster.changed = True
        take(self, reading, begin, run, weights)

    patch.setattr(Talks, "_take", take_at_once)


@mutant("swaps")
def weights_are_uploaded_whoever_has_written_them(patch: Patch) -> None:
    """W3: the checksum is verified again, as user code may have changed the weights."""
    patch.setattr(Uploads, "intact", lambda self, index: True)
    patch.setattr(SimShard, "intact", lambda self, elements, checksum: True)


@mutant("swaps")
def a_copy_that_is_none_is_not_told(patch: Patch) -> None:
    """W3: a wrong checksum is said, or the plan waits for a copy that nobody has."""
    patch.setattr(Uploads, "say_what_is_missing", lambda self, plan: None)
