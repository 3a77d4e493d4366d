"""Mistakes that look right: each is made by switching one rule off, and the simulator sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.sim.cluster import Cluster
from tests.sim.history import Violation

from adashard.wire.control import Frozen, Stale
from adashard.wire.messages import Begin, Entry, Exchange, Member, Plan, Report
from adashard.worker import Worker
from adashard_server.cluster.instructions import Instruction
from adashard_server.cluster.membership import Membership, Surroundings
from adashard_server.shard.instructions import Add, Admission, Wait
from adashard_server.shard.rounds import Rounds

SEEDS = range(300)

Patch = pytest.MonkeyPatch


def sums_survive_whatever_is_in_them(patch: Patch) -> None:
    """S4: only what is a prefix of the new list, in rank order, may be kept."""

    def keep(self: Rounds, order: tuple[str, ...]) -> None:
        self.begins = {name: begin for name, begin in self.begins.items() if name in order}
        self.order = order
        self._unready = set(self.mine)

    patch.setattr(Rounds, "_reorder", keep)


def ranks_are_given_anew(patch: Patch) -> None:
    """G2: a rank is never changed and never used again."""
    live = Membership._live_workers

    def rerank(self: Membership, around: Surroundings) -> list[Member]:
        return [replace(worker, rank=rank) for rank, worker in enumerate(live(self, around))]

    patch.setattr(Membership, "_live_workers", rerank)


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


def a_leaver_is_let_go_at_once(patch: Patch) -> None:
    """C8: a leaver goes when the others have at least its version."""
    release = Membership._release

    def hurry(self: Membership, around: Surroundings) -> list[Instruction]:
        self.versions = dict.fromkeys(self.versions, 0)
        return release(self, around)

    patch.setattr(Membership, "_release", hurry)


def the_own_report_is_forgotten_at_the_commit(patch: Patch) -> None:
    """S6: another shard may still need it; one lost message is enough."""
    own_report = Rounds.own_report

    def forget(self: Rounds, step: int, exchange: Exchange) -> Report | None:
        return own_report(self, step, exchange) if self.version < step else None

    patch.setattr(Rounds, "own_report", forget)


def sums_are_not_formed_in_rank_order(patch: Patch) -> None:
    """G2, S5: an early arrival waits."""
    admit = Rounds.admit

    def admit_at_once(
        self: Rounds, begin: Begin, index: int, start: int, count: int, *, ahead: int = 0
    ) -> Admission:
        admission = admit(self, begin, index, start, count)
        if not isinstance(admission, Wait):
            return admission
        nobody = all(self._progress(worker, index) == 0 for worker in self.order)
        return Add(start, start + count, first=nobody)

    patch.setattr(Rounds, "admit", admit_at_once)


def a_repeated_stream_is_added_again(patch: Patch) -> None:
    """S5: what is in the sum is skipped."""
    admit = Rounds.admit

    def admit_again(
        self: Rounds, begin: Begin, index: int, start: int, count: int, *, ahead: int = 0
    ) -> Admission:
        admission = admit(self, begin, index, start, count)
        again = admission is None and begin.step > self.version
        return Add(start, start + count, first=False) if again else admission

    patch.setattr(Rounds, "admit", admit_again)


def a_record_outlives_its_generation(patch: Patch) -> None:
    """W2: the record of a commit that was undone came with the reply, and is void."""
    open_ = Worker.open

    def remember(self: Worker, plan: Plan) -> bool:
        incoming = self._incoming
        opened = open_(self, plan)
        self._incoming = incoming
        return opened

    patch.setattr(Worker, "open", remember)


def a_commit_that_nobody_saw_is_kept(patch: Patch) -> None:
    """S2: a step that no slice anywhere has taken is formed again, with the workers of now."""
    plan_ = Rounds.plan

    def keep(self: Rounds, plan: Plan) -> None:
        owed, record = set(self._owed), self.record
        plan_(self, plan)
        if owed and not self._owed and not self.opened:
            self._owed, self.record = owed, record

    patch.setattr(Rounds, "plan", keep)


@pytest.mark.parametrize(
    "mistake",
    [
        sums_survive_whatever_is_in_them,
        ranks_are_given_anew,
        a_worker_is_not_bound_by_its_answer,
        a_shard_is_not_bound_by_its_answer,
        a_leaver_is_let_go_at_once,
        the_own_report_is_forgotten_at_the_commit,
        sums_are_not_formed_in_rank_order,
        a_repeated_stream_is_added_again,
        a_record_outlives_its_generation,
        a_commit_that_nobody_saw_is_kept,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_the_simulator_sees(mistake: Callable[[Patch], None], monkeypatch: Patch):
    mistake(monkeypatch)
    assert any(goes_wrong(seed) for seed in SEEDS)


def goes_wrong(seed: int) -> bool:
    try:
        Cluster(seed).run()
    except Violation:
        return True
    return False
