"""A coordinator that has lost its registry goes on from what its members have kept (C1)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cluster.scenes import SPEC, announced, told

from adashard.wire.control import (
    Bye,
    Freeze,
    Hello,
    OnExisting,
    Renewal,
    ShardHello,
    Stale,
    Standing,
    Welcome,
    WorkerHello,
)
from adashard.wire.errors import (
    InvalidRequest,
    JobExists,
    LeaseExpired,
    ModelMismatch,
    Overloaded,
    from_info,
)
from adashard.wire.messages import Entry, Lineage, Member
from adashard.wire.spec import Parameter
from adashard.wire.version import VERSION
from adashard_server.cluster import takeover as module
from adashard_server.cluster.coordinator import Coordinator
from adashard_server.cluster.instructions import HangUp, Instruction, StepDown, Swap
from adashard_server.cluster.leases import RETURN_S, LeaseSettings
from adashard_server.cluster.registry import ABSENT

LEASES = LeaseSettings(lease_s=15.0, grace_s=2.0, renew_s=1.0, replace_after_s=5.0)
WORKERS = ("worker-0", "worker-1")
SHARD = "shard-00"
MEMBERS = (*WORKERS, SHARD)


def an_entry(generation: int = 7, workers: tuple[str, ...] = WORKERS, **changes: object) -> Entry:
    """What a coordinator that has died has left in its members."""
    entry = Entry(
        job="job",
        generation=generation,
        author="dead/3",
        spec=SPEC,
        workers=tuple(Member(id=worker, rank=rank) for rank, worker in enumerate(workers)),
        shards=(Member(id=SHARD, address="s:1"),),
        placement=(0, 0, 0),
        lineage=Lineage(number=1, origin="worker-0"),
        opened=True,
        next_rank=5,
    )
    return replace(entry, **changes)  # type: ignore[arg-type]


class Successor:
    """A coordinator that begins with nothing, with a clock and a registry in the test's hand."""

    def __init__(self, *, alone: bool = True, entries: tuple[Entry, ...] = ()) -> None:
        self.now = 0.0
        self.coordinator = Coordinator(
            "c", entries, leases=LEASES, min_shards=1, token="", alone=alone, now=0.0
        )

    @classmethod
    def begun(cls, alone: bool = True) -> Successor:
        """One that has taken over a job: its own generation 8 is written."""
        one = cls(alone=alone)
        for member in MEMBERS:
            one.comes(member, an_entry())
        assert one.wait(LEASES.grace_s).entry.generation == 8
        one.coordinator.swapped("job", True, None, one.now)
        return one

    def comes(self, member: str, *entries: Entry, **worker: object) -> list[Instruction]:
        """A member says hello, with what it has kept."""
        promised = max((entry.generation for entry in entries), default=0)
        hello = Hello(id=member, version=VERSION, host="h", pid=1, entries=entries)
        if member.startswith("shard"):
            hello = replace(hello, shard=ShardHello(address="s:1"))
        else:
            fields = {"job": "job", "spec": SPEC, "generation": promised, **worker}
            hello = replace(hello, worker=WorkerHello(**fields))  # type: ignore[arg-type]
        return self.coordinator.hello(hello, self.now)

    def renews(self, member: str, generation: int) -> list[Instruction]:
        standing = Standing(job="job", generation=generation, version=0)
        return self.coordinator.handle(member, Renewal(standings=(standing,)), self.now)

    def tick(self) -> list[Swap]:
        return [one for one in self.coordinator.tick(self.now) if isinstance(one, Swap)]

    def wait(self, seconds: float) -> Swap:
        """The one write that comes after exactly so many seconds, and not before."""
        self.now += seconds - 0.5
        assert self.tick() == []
        self.now += 0.5
        (swap,) = self.tick()
        return swap


def test_the_next_generation_has_the_same_members_and_a_higher_number():
    one = Successor()
    for member in MEMBERS:
        said = one.comes(member, an_entry())
        assert told(said, Welcome)[member].job_version == -1
    swap = one.wait(LEASES.grace_s)
    assert swap.expected == ABSENT
    assert swap.entry == replace(an_entry(8), author=swap.entry.author)
    frozen = told(one.coordinator.swapped("job", True, None, one.now), Freeze)
    assert frozen.keys() == set(MEMBERS)


def test_what_was_taken_over_is_told_once():
    one = Successor()
    said = [announced(one.comes(member, an_entry())) for member in MEMBERS]
    assert said == [["taken_over"], [], []]


def test_a_member_that_does_not_come_is_waited_for_as_long_as_one_needs_who_lives():
    one = Successor()
    one.comes("worker-0", an_entry())
    one.comes(SHARD, an_entry())
    for _ in range(int(LEASES.grace_s + RETURN_S) - 1):
        one.now += 1.0
        one.renews("worker-0", 7)
        one.renews(SHARD, 7)
        assert one.tick() == []
    one.now += 1.0
    (swap,) = one.tick()
    assert [worker.id for worker in swap.entry.workers] == ["worker-0"]


@given(
    st.permutations(MEMBERS),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_it_begins_above_all_that_its_members_have_kept_whatever_the_order(
    order: list[str], generations: list[int], opened: list[bool]
):
    one = Successor()
    entries = [
        an_entry(generation, opened=one)
        for generation, one in zip(generations, opened, strict=True)
    ]
    for member, entry in zip(order, entries, strict=True):
        one.comes(member, entry)
        assert one.tick() == []
    newest = max(entries, key=lambda entry: (entry.generation, entry.opened))
    swap = one.wait(LEASES.grace_s)
    assert swap.expected == ABSENT
    assert swap.entry.generation == max(generations) + 1
    assert swap.entry.opened == newest.opened


def test_a_member_that_only_the_last_generation_knew_has_the_grace_to_come():
    one = Successor()
    for member in MEMBERS:
        one.comes(member, an_entry())
    one.now += LEASES.grace_s / 2
    assert one.tick() == []
    one.comes("worker-2", an_entry(8, workers=(*WORKERS, "worker-2")))
    swap = one.wait(LEASES.grace_s / 2)
    assert swap.entry.generation == 9
    assert [worker.id for worker in swap.entry.workers] == [*WORKERS, "worker-2"]


@pytest.mark.parametrize("generation", [3, 7])
def test_what_the_registry_holds_goes_before_what_members_know_no_better(generation: int):
    one = Successor(entries=(an_entry(7),), alone=False)
    assert announced(one.comes(SHARD, an_entry(generation))) == []
    (swap,) = one.tick()
    assert swap.expected == (7, "dead/3")
    assert swap.entry.generation == 8


def test_a_registry_that_came_back_with_less_is_followed_by_what_members_know():
    one = Successor(entries=(an_entry(3, author="dead/1"),), alone=False)
    for member in MEMBERS:
        one.comes(member, an_entry(7))
    swap = one.wait(LEASES.grace_s)
    assert swap.expected == (3, "dead/1"), "which fails where it was this coordinator that lagged"
    assert swap.entry.generation == 8


def test_workers_that_took_the_job_for_a_new_one_say_hello_to_the_old_one():
    one = Successor()
    other = replace(SPEC, parameters=(Parameter(name="other", shape=(2,)),))
    one.comes("worker-9", spec=other)
    assert HangUp("worker-9") in one.comes(SHARD, an_entry())
    with pytest.raises(ModelMismatch):
        one.comes("worker-9", spec=other)
    with pytest.raises(JobExists):
        one.comes("worker-8", on_existing=OnExisting.ERROR)
    one.comes("worker-7")
    for worker in WORKERS:
        one.comes(worker, an_entry())
    swap = one.wait(LEASES.grace_s)
    assert [worker.id for worker in swap.entry.workers] == [*WORKERS, "worker-7"]


# --- who comes too late --------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [8, 12])
def test_a_worker_that_comes_too_late_with_another_generation_is_turned_away(generation: int):
    one = Successor.begun()
    late = an_entry(generation, workers=("worker-2",))
    with pytest.raises(LeaseExpired):
        one.comes("worker-2", late)


@pytest.mark.parametrize("generation", [9, 12])
def test_a_shard_that_comes_too_late_forgets_the_job_and_stays(generation: int):
    one = Successor.begun()
    late = replace(an_entry(generation), shards=(Member(id="shard-01", address="s:2"),))
    one.comes("shard-01", late)
    said = one.renews("shard-01", generation)
    bye = told(said, Bye)["shard-01"]
    assert (bye.job, bye.generation) == ("job", generation)
    assert isinstance(from_info(bye.error), LeaseExpired)
    assert not any(isinstance(one, HangUp | StepDown) for one in said)
    assert one.coordinator.jobs["job"].entry.generation == 8


def test_a_stale_answer_turns_away_who_gives_it():
    one = Successor.begun()
    said = one.coordinator.handle("worker-0", Stale(job="job", promised=11), one.now)
    assert told(said, Bye)["worker-0"].generation == 11
    assert HangUp("worker-0") in said


def test_where_others_may_write_a_higher_generation_ends_the_coordinator():
    one = Successor.begun(alone=False)
    (step_down,) = one.coordinator.handle("worker-0", Stale(job="job", promised=11), one.now)
    assert isinstance(step_down, StepDown)


# --- what cannot be right ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"job": ""},
        {"generation": 0},
        {"lineage": None},
        {"shards": ()},
        {"placement": (0, 0)},
        {"placement": (0, 0, 1)},
        {"next_rank": 1},
        {"workers": (Member(id="worker-1", rank=0),)},
        {"spec": replace(SPEC, slice_bytes=3)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_entry_that_no_coordinator_has_written_is_refused(changes: dict[str, object]):
    one = Successor()
    with pytest.raises(InvalidRequest):
        one.comes("worker-0", an_entry(**changes))
    assert one.coordinator.jobs == {}


def test_jobs_that_are_taken_over_have_a_largest_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "JOBS_MAX", 1)
    one = Successor()
    one.comes(SHARD, an_entry())
    with pytest.raises(Overloaded, match="1 jobs"):
        one.comes("worker-0", an_entry(job="another"))
