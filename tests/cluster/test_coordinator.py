"""The coordinator knows who is there, lets workers into jobs, and says what it sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cluster.scenes import SPEC, announced, told

from adashard.wire.control import (
    Freeze,
    FromMember,
    Frozen,
    Hello,
    Holding,
    Logged,
    OnExisting,
    Open,
    Opened,
    Planned,
    Renewal,
    ShardHello,
    Stale,
    Standing,
    StepSummary,
    Welcome,
    WorkerHello,
)
from adashard.wire.errors import (
    AdashardError,
    InvalidRequest,
    JobExists,
    LeaseExpired,
    ModelMismatch,
    Overloaded,
    Unauthenticated,
    VersionSkew,
    from_info,
)
from adashard.wire.messages import Entry, Lineage, Member
from adashard.wire.spec import JobSpec, Parameter
from adashard.wire.version import VERSION
from adashard_server.cluster import coordinator as module
from adashard_server.cluster.coordinator import Coordinator, refusal
from adashard_server.cluster.instructions import Instruction, StepDown, Swap
from adashard_server.cluster.leases import LeaseSettings
from adashard_server.cluster.membership import Phase
from adashard_server.cluster.statistics import Event
from adashard_server.cluster.view import EVENTS_MAX, CoordinatorView

LEASES = LeaseSettings(lease_s=15.0, grace_s=2.0, replace_after_s=5.0)


def a_worker(
    member: str = "worker-0", job: str = "job", spec: JobSpec = SPEC, **changes: object
) -> Hello:
    worker = replace(WorkerHello(job=job, spec=spec), **changes)  # type: ignore[arg-type]
    return Hello(id=member, version=VERSION, host="h", pid=1, worker=worker)


def a_shard(member: str = "shard-00") -> Hello:
    shard = ShardHello(address=f"{member}:5000")
    return Hello(id=member, version=VERSION, host="h", pid=2, shard=shard)


class Bench:
    """A coordinator with a clock, and a registry that does what it is told."""

    def __init__(self, *entries: Entry, token: str = "", min_shards: int = 1) -> None:
        self.now = 0.0
        self.coordinator = Coordinator(
            "c", entries, leases=LEASES, min_shards=min_shards, token=token, now=0.0
        )

    @classmethod
    def opened(cls, *workers: str) -> Bench:
        """A coordinator with one open job on one shard."""
        bench = cls()
        for member in workers:
            bench.hello(a_worker(member))
        bench.hello(a_shard())
        bench.make_generation()
        return bench

    def hello(self, hello: Hello) -> Welcome:
        return told(self.coordinator.hello(hello, self.now), Welcome)[hello.id]

    def says(self, member: str, *messages: FromMember) -> list[Instruction]:
        said: list[Instruction] = []
        for message in messages:
            said = self.coordinator.handle(member, message, self.now)
        return said

    def renews(self, member: str, **standing: object) -> list[Instruction]:
        generation = self.coordinator.jobs["job"].entry.generation
        one = replace(  # type: ignore[arg-type]
            Standing(job="job", generation=generation, version=0), **standing
        )
        return self.says(member, Renewal(standings=(one,)))

    def tick(self, after_s: float = 0.1) -> list[Instruction]:
        """Time passes as it does, without a pause of the coordinator."""
        said: list[Instruction] = []
        while after_s > 0:
            self.now += min(after_s, 1.0)
            after_s -= 1.0
            said += self.coordinator.tick(self.now)
        return said

    def make_generation(self, after_s: float = 0.1) -> list[Instruction]:
        job, said = self.coordinator.jobs["job"], self.tick(after_s)
        assert any(isinstance(one, Swap) for one in said)
        self.coordinator.swapped("job", True, None, self.now)
        generation = job.entry.generation
        lineage = job.entry.lineage
        assert lineage is not None
        for member in job.members:
            holds = member.id == lineage.origin or (job.entry.opened and member in job.entry.shards)
            slices = (0, 1, 2) if holds else ()
            answer = Frozen(
                job="job",
                generation=generation,
                lineage=lineage.number,
                slices=slices,
                versions=(0,) * len(slices),
            )
            self.says(member.id, answer)
        said = self.says("shard-00", Planned(job="job", generation=generation))
        if job.phase is Phase.MARKING:
            said = self.coordinator.swapped("job", True, None, self.now)
        for member in job.members:
            self.says(member.id, Opened(job="job", generation=generation))
        return said

    def view(self) -> CoordinatorView:
        return CoordinatorView(self.coordinator, "memory", "h:50051", lambda: self.now)


# --- who is let in -------------------------------------------------------------------------------


def test_a_welcome_says_the_times_of_membership_and_where_the_job_stands():
    bench = Bench()
    welcome = bench.hello(a_worker())
    assert (welcome.version, welcome.lease_s, welcome.job_version) == (VERSION, 15.0, -1)
    bench = Bench.opened("worker-0")
    bench.says("shard-00", StepSummary(job="job", step=7))
    assert bench.hello(a_worker("worker-1")).job_version == 7


@pytest.mark.parametrize("token", ["", "wrong", "geheim"])
def test_without_the_clusters_token_nobody_is_let_in(token: str):
    bench = Bench(token="gehéim")
    with pytest.raises(Unauthenticated, match="h has no valid token"):
        bench.hello(replace(a_shard(), token=token))
    bench.hello(replace(a_shard(), token="gehéim"))


def test_another_version_is_refused_by_both_numbers():
    with pytest.raises(VersionSkew, match=r"the shard has adashard '9\.0\.0'"):
        Bench().hello(replace(a_shard(), version="9.0.0"))


@pytest.mark.parametrize(
    "hello",
    [
        replace(a_shard(), shard=None),
        replace(a_shard(), worker=a_worker().worker),
        a_shard("short"),
        a_shard("x" * 65),
    ],
    ids=["neither", "both", "short id", "long id"],
)
def test_a_hello_that_cannot_be_right_is_refused(hello: Hello):
    with pytest.raises(InvalidRequest):
        Bench().hello(hello)


def test_shards_and_jobs_have_a_largest_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SHARDS_MAX", 1)
    monkeypatch.setattr(module, "JOBS_MAX", 1)
    bench = Bench()
    bench.hello(a_shard())
    bench.hello(a_shard())  # has come back
    with pytest.raises(Overloaded, match="1 shards"):
        bench.hello(a_shard("shard-01"))
    bench.hello(a_worker())
    with pytest.raises(Overloaded, match="1 jobs"):
        bench.hello(a_worker("worker-1", job="another"))


def test_whoever_is_refused_is_told_why_and_is_no_member():
    bench = Bench.opened("worker-0")
    other = replace(SPEC, parameters=(Parameter(name="other", shape=(2,)),))
    with pytest.raises(ModelMismatch) as raised:
        bench.hello(a_worker("worker-1", spec=other))
    with pytest.raises(LeaseExpired, match="has been forgotten"):
        bench.says("worker-1", Renewal())
    bye = refusal(a_worker("worker-1"), raised.value)
    assert bye.job == "job"
    assert bye.error is not None
    assert from_info(bye.error).reason == "ModelMismatch"
    assert refusal(a_shard(), AdashardError("no")).job == ""


def test_a_worker_that_comes_back_is_the_one_it_was():
    bench = Bench.opened("worker-0")
    again = a_worker("worker-0", generation=1, on_existing=OnExisting.ERROR)
    assert bench.hello(again).job_version == 0
    assert len(bench.coordinator.contacts) == 2


def test_a_worker_that_was_left_out_does_not_come_back_under_its_old_id():
    bench = Bench.opened("worker-0")
    with pytest.raises(LeaseExpired, match="worker-9"):
        bench.hello(a_worker("worker-9", generation=1))


def test_a_job_is_replaced_when_its_workers_have_gone_and_people_are_told():
    bench = Bench.opened("worker-0")
    new = a_worker("worker-1", on_existing=OnExisting.REPLACE)
    with pytest.raises(JobExists):
        bench.hello(new)
    bench.coordinator.detached("worker-0", bench.now)
    bench.make_generation(after_s=2.5)
    said = bench.coordinator.hello(new, bench.now)
    assert announced(said) == ["replaced"]
    bench.make_generation()
    entry = bench.coordinator.jobs["job"].entry
    assert entry.lineage == Lineage(number=3, origin="worker-1")
    assert entry.workers == (Member(id="worker-1", rank=1),)


# --- who lives -----------------------------------------------------------------------------------


def test_whatever_a_member_says_renews_its_lease():
    bench = Bench.opened("worker-0")
    for _ in range(3):
        bench.tick(10.0)
        bench.says("worker-0", Logged(job="job", step=1))
        bench.says("shard-00", StepSummary(job="unknown", step=1))
    assert bench.coordinator.leases.dead(bench.now) == frozenset()


def test_a_worker_whose_stream_broke_is_left_out_after_the_grace_period():
    bench = Bench.opened("worker-0", "worker-1")
    bench.coordinator.detached("worker-1", bench.now)
    bench.coordinator.detached("stranger", bench.now)
    assert bench.tick(1.5) == []
    bench.make_generation(after_s=1.0)
    assert [one.id for one in bench.coordinator.jobs["job"].entry.workers] == ["worker-0"]


def test_a_worker_that_comes_back_within_the_grace_period_changes_nothing():
    bench = Bench.opened("worker-0")
    bench.coordinator.detached("worker-0", bench.now)
    bench.tick(1.5)
    bench.hello(a_worker("worker-0", generation=1))
    assert not any(isinstance(one, Swap) for one in bench.tick(3.0))


def test_a_member_that_died_and_is_in_no_generation_is_forgotten():
    bench = Bench.opened("worker-0")
    bench.hello(a_shard("shard-01"))
    bench.coordinator.detached("shard-01", bench.now)
    bench.coordinator.detached("shard-00", bench.now)
    bench.tick(6.0)
    assert "shard-01" in bench.coordinator.contacts  # may come back
    bench.tick(2.0)
    assert "shard-01" not in bench.coordinator.contacts


def test_a_worker_that_dies_while_it_waits_for_a_registry_is_in_no_generation():
    bench = Bench.opened("worker-0")
    bench.hello(a_worker("worker-1"))
    assert any(isinstance(one, Swap) for one in bench.tick())  # and nobody answers
    bench.hello(a_worker("worker-2"))
    bench.coordinator.detached("worker-2", bench.now)
    for _ in range(20):
        bench.tick(1.0)
        bench.renews("worker-0")
        bench.renews("worker-1", generation=0)
        bench.says("shard-00", Renewal())
    bench.coordinator.swapped("job", True, None, bench.now)
    bench.tick()
    members = {member.id for member in bench.coordinator.jobs["job"].members}
    assert members == {"worker-0", "worker-1", "shard-00"}
    assert bench.coordinator.jobs["job"].joiners == []


def test_a_worker_that_was_taken_for_dead_while_it_waited_joins_when_it_is_heard_again():
    bench = Bench()
    bench.hello(a_worker())
    bench.tick(16.0)
    assert bench.coordinator.jobs["job"].worker_ids() == set()
    bench.renews("worker-0", generation=0, leaving=True)
    assert bench.coordinator.jobs["job"].worker_ids() == set()
    bench.renews("worker-0", generation=0)
    bench.renews("worker-0", generation=0)
    assert bench.coordinator.jobs["job"].joiners == ["worker-0"]


def test_a_worker_of_another_model_or_of_a_lost_job_does_not_come_back_so():
    bench = Bench()
    bench.hello(a_worker())
    bench.tick(16.0)
    job = bench.coordinator.jobs["job"]
    other = replace(SPEC, parameters=(Parameter(name="other", shape=(2,)),))
    job.restart(other)
    bench.renews("worker-0", generation=0)
    assert job.worker_ids() == set()
    job.restart(SPEC)
    job.phase = Phase.LOST
    bench.renews("worker-0", generation=0)
    assert job.worker_ids() == set()


def test_a_draining_shard_takes_no_new_job():
    bench = Bench()
    bench.hello(a_shard())
    bench.hello(a_shard("shard-01"))
    bench.says("shard-01", Renewal(draining=True))
    bench.hello(a_worker())
    bench.make_generation()
    assert [one.id for one in bench.coordinator.jobs["job"].entry.shards] == ["shard-00"]


# --- other coordinators --------------------------------------------------------------------------


def test_a_member_that_has_promised_more_ends_this_coordinator():
    bench = Bench.opened("worker-0")
    assert bench.says("worker-0", Stale(job="job", promised=1)) == []
    (down,) = bench.says("worker-0", Stale(job="job", promised=2))
    assert isinstance(down, StepDown)
    (down,) = bench.renews("shard-00", generation=2)
    assert isinstance(down, StepDown)


def test_messages_about_an_unknown_job_lead_to_nothing():
    bench = Bench()
    bench.hello(a_shard())
    for message in (
        Frozen(job="job", generation=1),
        Planned(job="job", generation=1),
        Opened(job="job", generation=1),
        Stale(job="job", promised=9),
    ):
        assert bench.says("shard-00", message) == []
    bench.hello(a_worker())
    elsewhere = Standing(job="another", generation=0, version=-1)
    assert bench.says("worker-0", Renewal(standings=(elsewhere,))) == []


def test_a_job_of_a_known_name_begins_above_what_its_shards_have_promised():
    bench = Bench()
    bench.hello(a_shard())
    bench.says("shard-00", Renewal(standings=(Standing(job="job", generation=6, version=3),)))
    bench.says("shard-00", Renewal(standings=(Standing(job="job", generation=4, version=3),)))
    bench.hello(a_worker())
    bench.make_generation()
    assert bench.coordinator.jobs["job"].entry.generation == 7


def test_a_coordinator_that_starts_gives_every_member_time_to_come_and_makes_a_generation():
    entry = Bench.opened("worker-0").coordinator.jobs["job"].entry
    bench = Bench(entry)
    bench.hello(a_shard())
    bench.hello(a_worker("worker-0", generation=1))
    opens = told(bench.make_generation(), Open)
    assert opens.keys() == {"worker-0", "shard-00"}
    assert opens["worker-0"].plan.entry.generation == 2
    silent = Bench(entry)
    assert silent.coordinator.leases.dead(4.9) == frozenset()
    assert silent.coordinator.leases.dead(5.0) == {"worker-0", "shard-00"}


def test_a_coordinator_that_finds_another_ones_entry_in_the_registry_steps_down():
    bench = Bench.opened("worker-0")
    entry = bench.coordinator.jobs["job"].entry
    older = replace(entry, generation=entry.generation - 1, author="other/1")
    for stored in (None, entry, older):
        assert bench.coordinator.looked_up("job", stored) == []
    for changes in ({"author": "other/1"}, {"generation": 9}):
        (said,) = bench.coordinator.looked_up("job", replace(entry, **changes))
        assert isinstance(said, StepDown)


def test_a_generation_reaches_everybody_it_names():
    bench = Bench()
    bench.hello(a_shard())
    bench.hello(a_worker())
    bench.tick()
    said = bench.coordinator.swapped("job", True, None, bench.now)
    assert told(said, Freeze).keys() == {"worker-0", "shard-00"}


# --- what it tells people ------------------------------------------------------------------------


def test_the_view_of_an_empty_cluster_says_what_it_waits_for():
    view = Bench(min_shards=2).view()
    cluster = view.cluster_statistics()
    assert (cluster.shard_count, cluster.worker_count, cluster.job_count) == (0, 0, 0)
    assert cluster.not_ready == ("2 more shards are needed",)
    assert view.job_statistics() == view.shard_statistics() == view.worker_statistics() == []


def test_the_view_shows_members_with_their_rank_version_and_status():
    bench = Bench.opened("worker-0", "worker-1")
    view = bench.view()
    bench.hello(a_worker("worker-2"))
    bench.renews("worker-1", version=3, leaving=True)
    bench.make_generation()
    bench.hello(a_worker("worker-3"))
    bench.coordinator.detached("worker-0", bench.now)
    bench.tick(1.0)
    shown = [(one.id, one.rank, one.version, one.status) for one in view.worker_statistics("job")]
    assert shown == [
        ("worker-0", 0, -1, "silent"),
        ("worker-1", 1, 3, "leaving"),
        ("worker-2", 2, -1, "live"),
        ("worker-3", None, -1, "joining"),
    ]
    assert view.worker_statistics("another") == []
    cluster = view.cluster_statistics()
    assert (cluster.shard_count, cluster.worker_count, cluster.not_ready) == (1, 4, ())
    assert cluster.uptime_s == pytest.approx(1.1)


def test_the_view_sums_what_shards_hold_by_kind_and_by_shard():
    bench = Bench.opened("worker-0")
    bench.hello(a_shard("shard-01"))
    one = Holding(job="job", weight_bytes=48, state_bytes={"row": 8, "column": 4})
    two = Holding(job="other", weight_bytes=16, state_bytes={"row": 2})
    bench.says("shard-00", Renewal(holdings=(one, two)))
    bench.says("shard-01", Renewal(draining=True))
    first, second = bench.view().shard_statistics()
    assert (first.weight_bytes, first.state_bytes) == (64, {"row": 10, "column": 4})
    assert (first.address, first.index, first.status) == ("shard-00:5000", 0, "live")
    assert (second.index, second.status, second.versions) == (1, "draining", {})
    (job,) = bench.view().job_statistics()
    assert (job.weight_bytes, job.state_bytes) == (48, {"row": 8, "column": 4})
    assert job.state_bytes_by_shard == {"shard-00": 12}
    assert (job.element_count, job.slice_count, job.adam_bytes) == (12, 3, 96)


def test_the_view_says_how_a_job_is():
    bench = Bench()
    bench.hello(a_worker())
    view = bench.view()

    def status() -> tuple[str, str]:
        (job,) = view.job_statistics()
        return job.status, job.status_reason

    bench.tick()
    assert status() == ("waiting", "no shard is there")
    bench.hello(a_shard())
    bench.tick()
    assert status() == ("changing", "")
    bench = Bench.opened("worker-0")
    view = bench.view()
    assert status() == ("running", "")
    bench.coordinator.detached("worker-0", bench.now)
    bench.make_generation(after_s=2.5)
    assert status()[0] == "waiting"
    bench.coordinator.jobs["job"].phase = Phase.LOST
    bench.coordinator.jobs["job"].reason = "its shard is gone"
    assert status() == ("lost", "its shard is gone")


def test_the_view_remembers_the_newest_events():
    view = Bench().view()
    for number in range(1, EVENTS_MAX + 3):
        job = "job" if number % 2 else "other"
        view.remember(Event(sequence=number, time_s=0.0, job=job, name="n", text="", facts={}))
    assert [event.sequence for event in view.events()][:1] == [3]
    assert len(view.events()) == EVENTS_MAX
    assert [event.sequence for event in view.events(EVENTS_MAX, "job")] == [EVENTS_MAX + 1]
