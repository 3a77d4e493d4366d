"""Every registry keeps one truth per job, whoever writes to it at the same time."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgpack
import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from redis.crc import key_slot

from adashard.wire.errors import (
    CannotReachServer,
    Internal,
    InvalidSettings,
    JobLost,
    Overloaded,
    Unauthenticated,
    VersionSkew,
)
from adashard.wire.messages import Entry, Lineage, Member
from adashard.wire.placement import cut
from adashard.wire.spec import AdafactorLayout, Group, JobSpec, Parameter
from adashard_server.cluster.redis_registry import SCHEMA, RedisRegistry
from adashard_server.cluster.registry import ABSENT, MemoryRegistry, Registry, identity_of
from adashard_server.cluster.statistics import Event

SPEC = JobSpec(
    parameters=(Parameter(name="weight", shape=(4, 3)), Parameter(name="bias", shape=(4,))),
    groups=(Group(adafactor=AdafactorLayout(momentum=True)),),
    slice_bytes=1 << 22,
    min_workers=2,
)


def entry(job: str = "job", generation: int = 1, author: str = "coordinator:1", **changes) -> Entry:
    return Entry(job=job, generation=generation, author=author, spec=SPEC, **changes)


Open = Callable[..., Registry]


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.needs("redis-server"))])
def open_registry(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens a registry; two that are opened under one name are the same registry."""
    opened: list[Registry] = []
    in_memory: dict[str, Registry] = {}
    test = uuid.uuid4().hex

    def open_in_memory(name: str = "a", **settings) -> Registry:
        return in_memory.setdefault(name, MemoryRegistry(**settings))

    def open_in_redis(name: str = "a", **settings) -> Registry:
        url = request.getfixturevalue("shared_redis").url
        opened.append(RedisRegistry(url, prefix=f"{test}-{name}", **settings))
        return opened[-1]

    yield open_in_memory if request.param == "memory" else open_in_redis
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(open_registry: Open) -> Registry:
    return open_registry()


# --- every registry ------------------------------------------------------------------------------


class TestEntries:
    def test_a_job_that_nobody_wrote_is_not_there(self, registry: Registry):
        assert registry.jobs() == []
        assert registry.read("job") is None

    def test_an_entry_is_read_as_it_was_written(self, registry: Registry):
        written = entry(
            workers=(Member(id="w-1", rank=0), Member(id="w-2", rank=4, leaving=True)),
            shards=(Member(id="s-1", address="127.0.0.1:5000"),),
            placement=(0, 0),
            next_rank=5,
            lineage=Lineage(number=1, origin="w-1"),
            opened=True,
        )
        assert registry.swap(written, expected=ABSENT)
        assert registry.read("job") == written
        assert registry.jobs() == ["job"]

    @pytest.mark.parametrize(
        "expected",
        [ABSENT, (1, "coordinator:2"), (2, "coordinator:1"), (1, ""), (11, "coordinator:1")],
    )
    def test_whoever_expected_something_else_changes_nothing(
        self, registry: Registry, expected: tuple[int, str]
    ):
        first = entry()
        assert registry.swap(first, expected=ABSENT)
        assert not registry.swap(entry(generation=2), expected=expected)
        assert not registry.remove("job", expected=expected)
        assert registry.read("job") == first

    def test_a_job_that_is_not_there_is_neither_changed_nor_removed(self, registry: Registry):
        assert not registry.swap(entry(generation=2), expected=(1, "coordinator:1"))
        assert not registry.remove("job", expected=(1, "coordinator:1"))
        assert not registry.remove("job", expected=ABSENT)
        assert registry.jobs() == []

    def test_one_generation_is_written_twice_and_the_first_write_is_then_over(
        self, registry: Registry
    ):
        closed = entry(author="coordinator:1")
        opened = entry(author="coordinator:2", opened=True)
        assert registry.swap(closed, expected=ABSENT)
        assert registry.swap(opened, expected=(1, "coordinator:1"))
        assert not registry.swap(entry(generation=2), expected=(1, "coordinator:1"))
        assert registry.read("job") == opened

    def test_a_repeated_swap_fails_and_the_author_tells_that_the_first_arrived(
        self, registry: Registry
    ):
        assert registry.swap(entry(), expected=ABSENT)
        assert not registry.swap(entry(), expected=ABSENT)
        assert identity_of(registry.read("job")) == (1, "coordinator:1")

    def test_a_job_that_was_removed_can_begin_anew(self, registry: Registry):
        assert registry.swap(entry(generation=7), expected=ABSENT)
        assert registry.remove("job", expected=(7, "coordinator:1"))
        assert registry.read("job") is None
        assert registry.swap(entry(generation=1), expected=ABSENT)

    @pytest.mark.parametrize(
        "job", ["", " ", "a b", "{x}:entries", "*", "a\nb\0c", "größe", "模型", "🌋", "j" * 128]
    )
    def test_any_text_is_a_name(self, registry: Registry, job: str):
        other = entry(job="other", generation=2)
        assert registry.swap(other, expected=ABSENT)
        assert registry.swap(entry(job=job), expected=ABSENT)
        assert registry.read(job) == entry(job=job)
        assert registry.jobs() == sorted([job, "other"])
        assert registry.remove(job, expected=(1, "coordinator:1"))
        assert registry.jobs() == ["other"]

    @pytest.mark.parametrize("author", ["a b", "0 ", "größe:12"])
    def test_any_text_is_an_author(self, registry: Registry, author: str):
        assert registry.swap(entry(author=author), expected=ABSENT)
        assert registry.swap(entry(generation=2, author=author), expected=(1, author))

    @pytest.mark.parametrize("nameless", [entry(generation=0), entry(author="")])
    def test_an_entry_that_would_look_like_none_is_a_mistake_in_the_program(
        self, registry: Registry, nameless: Entry
    ):
        with pytest.raises(ValueError, match="without generation or author"):
            registry.swap(nameless, expected=ABSENT)

    def test_two_who_have_opened_one_registry_see_each_other(self, open_registry: Open):
        mine, yours, other = open_registry("a"), open_registry("a"), open_registry("b")
        assert mine.swap(entry(), expected=ABSENT)
        assert yours.read("job") == entry()
        assert yours.swap(entry(generation=2), expected=(1, "coordinator:1"))
        assert not mine.swap(entry(generation=3), expected=(1, "coordinator:1"))
        assert other.jobs() == []

    def test_of_two_who_swap_at_once_exactly_one_wins(self, open_registry: Open):
        registries = [open_registry(), open_registry()]
        expected = ABSENT
        with ThreadPoolExecutor(2) as pool:
            for generation in range(1, 51):
                together = threading.Barrier(2)

                def race(
                    racer: int,
                    generation: int = generation,
                    expected: tuple[int, str] = expected,
                    together: threading.Barrier = together,
                ) -> bool:
                    written = entry(generation=generation, author=f"coordinator-{racer}")
                    together.wait()
                    return registries[racer].swap(written, expected=expected)

                won = list(pool.map(race, range(2)))
                assert sorted(won) == [False, True]
                expected = identity_of(registries[0].read("job"))
                assert expected == (generation, f"coordinator-{won.index(True)}")

    def test_it_agrees_with_a_dictionary_whatever_is_done(self, open_registry: Open):
        class AgainstADictionary(RegistryMachine):
            open = staticmethod(open_registry)

        run_state_machine_as_test(
            AgainstADictionary, settings=settings(max_examples=25, stateful_step_count=15)
        )


class RegistryMachine(RuleBasedStateMachine):
    """Two connections to one registry, and a dictionary that says what must be in it."""

    open: Open
    jobs = st.sampled_from(["a", "b"])
    identities = st.tuples(st.integers(1, 3), st.sampled_from(["x", "y"]))

    @initialize()
    def begin(self) -> None:
        name = uuid.uuid4().hex
        self.registries = [self.open(name), self.open(name)]
        self.model: dict[str, Entry] = {}

    @rule(
        job=jobs,
        identity=identities,
        expected=st.none() | st.just(ABSENT) | identities,
        opened=st.booleans(),
        through=st.integers(0, 1),
    )
    def swap(self, job, identity, expected, opened, through) -> None:
        stored = identity_of(self.model.get(job))
        expected = stored if expected is None else expected
        written = entry(job=job, generation=identity[0], author=identity[1], opened=opened)
        assert self.registries[through].swap(written, expected=expected) == (stored == expected)
        if stored == expected:
            self.model[job] = written

    @rule(job=jobs, expected=st.none() | identities, through=st.integers(0, 1))
    def remove(self, job, expected, through) -> None:
        stored = identity_of(self.model.get(job))
        expected = stored if expected is None else expected
        removed = job in self.model and stored == expected
        assert self.registries[through].remove(job, expected=expected) == removed
        if removed:
            del self.model[job]

    @invariant()
    def both_see_what_the_dictionary_holds(self) -> None:
        for registry in self.registries:
            assert registry.jobs() == sorted(self.model)
            assert {job: registry.read(job) for job in registry.jobs()} == self.model


class TestEvents:
    def test_an_event_is_read_as_it_was_written(self, registry: Registry):
        facts = {"worker": "w-1", "größe": "模型 🌋"}
        number = registry.append_event("job", "joined", "w-1 joined", facts, 12.5)
        expected = Event(
            sequence=number, time_s=12.5, job="job", name="joined", text="w-1 joined", facts=facts
        )
        assert registry.events() == [expected]

    def test_numbers_ascend_over_all_jobs_and_all_who_write(self, open_registry: Open):
        mine, yours = open_registry(), open_registry()
        numbers = [
            mine.append_event("a", "n", "t", {}, 2.0),
            yours.append_event("b", "n", "t", {}, 1.0),
            mine.append_event("", "n", "t", {}, 3.0),
        ]
        assert numbers[0] >= 1
        assert numbers == sorted(set(numbers))
        assert [(event.sequence, event.job) for event in mine.events()] == [
            *zip(numbers, ["a", "b", ""], strict=True)
        ]

    def test_reading_goes_on_where_it_stopped(self, registry: Registry):
        numbers = [registry.append_event("job", "n", str(n), {}, 0.0) for n in range(5)]
        first = registry.events(limit=2)
        rest = registry.events(after=first[-1].sequence)
        assert [event.sequence for event in first + rest] == numbers
        assert registry.events(after=numbers[-1]) == []

    def test_the_oldest_go_when_the_log_is_full_and_no_number_comes_again(
        self, open_registry: Open
    ):
        registry = open_registry(events_kept=3)
        numbers = [registry.append_event("job", "n", str(n), {}, 0.0) for n in range(7)]
        assert [event.sequence for event in registry.events()] == numbers[-3:]
        assert registry.append_event("job", "n", "t", {}, 0.0) > numbers[-1]

    def test_who_writes_at_the_same_time_gets_numbers_of_his_own(self, open_registry: Open):
        registries = [open_registry(), open_registry()]

        def write(n: int) -> int:
            return registries[n % 2].append_event("job", "n", str(n), {}, 0.0)

        with ThreadPoolExecutor(4) as pool:
            numbers = dict(enumerate(pool.map(write, range(100))))
        events = registries[0].events()
        assert len(set(numbers.values())) == 100
        assert [event.sequence for event in events] == sorted(numbers.values())
        assert {int(event.text): event.sequence for event in events} == numbers


def test_each_registry_says_which_it_is(registry: Registry):
    assert registry.name == {MemoryRegistry: "memory", RedisRegistry: "redis"}[type(registry)]


# --- Redis alone ---------------------------------------------------------------------------------


@pytest.mark.needs("redis-server")
class TestRedis:
    @pytest.fixture
    def raw(self, shared_redis) -> Iterator[redis.Redis]:
        """The same server, without a registry between."""
        with redis.Redis.from_url(shared_redis.url) as client:
            yield client

    @pytest.fixture
    def prefix(self) -> str:
        return uuid.uuid4().hex

    @pytest.fixture
    def registry(self, shared_redis, prefix: str) -> Iterator[RedisRegistry]:
        """One in which something has been written."""
        registry = RedisRegistry(shared_redis.url, prefix=prefix)
        assert registry.swap(entry(), expected=ABSENT)
        registry.append_event("job", "n", "t", {}, 0.0)
        yield registry
        registry.close()

    @pytest.fixture
    def key(self, registry: RedisRegistry, prefix: str) -> Callable[[str], str]:
        """The key of a name in the registry."""
        return lambda name: f"{{{prefix}}}:{name}"

    def test_its_keys_lie_in_one_slot_of_a_cluster(self, key, raw: redis.Redis):
        keys = list(raw.scan_iter(key("*")))
        assert len(keys) == 3
        assert len({key_slot(key) for key in keys}) == 1

    def test_an_entry_outlives_the_coordinator_that_wrote_it(self, own_redis):
        before = RedisRegistry(own_redis.url)
        assert before.swap(entry(), expected=ABSENT)
        before.close()
        after = RedisRegistry(own_redis.url)
        assert after.read("job") == entry()
        after.close()

    def test_what_a_newer_version_has_stored_is_refused(
        self, registry: RedisRegistry, key, raw: redis.Redis
    ):
        newer = msgpack.packb({"schema": SCHEMA + 1, "value": "in a form that nobody knows yet"})
        raw.hset(key("entries"), "job", newer)
        with pytest.raises(VersionSkew, match=f"'job' was stored by a newer .* up to {SCHEMA}"):
            registry.read("job")
        raw.xadd(key("events"), {"event": newer}, id="0-*")
        with pytest.raises(VersionSkew, match="event 2 was stored by a newer"):
            registry.events()

    def test_a_field_that_a_newer_version_has_added_is_ignored(
        self, registry: RedisRegistry, key, raw: redis.Redis
    ):
        stored = msgpack.unpackb(raw.hget(key("entries"), "job"))
        stored["value"]["colour"] = "red"
        raw.hset(key("entries"), "job", msgpack.packb(stored))
        assert registry.read("job") == entry()

    @pytest.mark.parametrize(
        "damaged",
        [
            b"",
            b"\xc1",
            b"\x91" * 4000,
            b"\x81\xa1\xff",
            msgpack.packb([]),
            msgpack.packb({}),
            msgpack.packb({"schema": 1}),
            msgpack.packb({"schema": 1, "value": {"job": "job"}}),
            msgpack.packb({"schema": "1", "value": {}}),
            msgpack.packb({"schema": 1, "value": {}}) + b"more",
        ],
    )
    def test_what_is_damaged_is_said_to_be_lost_with_the_job_named(
        self, registry: RedisRegistry, key, raw: redis.Redis, damaged: bytes
    ):
        raw.hset(key("entries"), "job", damaged)
        with pytest.raises(JobLost, match="holds of job 'job' cannot be read"):
            registry.read("job")

    def test_a_placement_of_other_slices_than_the_job_has_is_refused(self, registry: RedisRegistry):
        shards = (Member(id="s0"),)
        placed = entry("placed", shards=shards, placement=(0,) * (len(cut(SPEC)) + 1))
        assert registry.swap(placed, expected=ABSENT)
        with pytest.raises(JobLost, match=r"'placed' cannot be used: a placement of \d+ slices"):
            registry.read("placed")

    def test_a_server_that_is_gone_is_named_without_the_password(self, own_redis):
        own_redis.stop()
        registry = RedisRegistry(
            f"redis://user:secret@127.0.0.1:{own_redis.port}/0?password=secret"
        )
        where = f"redis://127.0.0.1:{own_redis.port}/0"
        calls: list[Callable[[], object]] = [
            registry.jobs,
            registry.events,
            lambda: registry.read("job"),
            lambda: registry.swap(entry(), expected=ABSENT),
            lambda: registry.remove("job", expected=ABSENT),
            lambda: registry.append_event("job", "n", "t", {}, 0.0),
        ]
        for call in calls:
            with pytest.raises(CannotReachServer) as caught:
                call()
            assert caught.value.facts == {"url": where}
            assert f"the registry at {where} does not answer" in caught.value.message
            assert "secret" not in str(caught.value)
        registry.close()

    def test_a_server_that_has_come_back_is_found_again(self, own_redis):
        registry = RedisRegistry(own_redis.url)
        assert registry.swap(entry(), expected=ABSENT)
        own_redis.stop()
        with pytest.raises(CannotReachServer):
            registry.jobs()
        assert own_redis.start()
        assert registry.jobs() == []  # this server keeps nothing; the scripts are gone as well
        assert registry.swap(entry(), expected=ABSENT)
        registry.close()

    def test_a_wrong_password_is_told_from_a_server_that_is_gone(self, shared_redis):
        registry = RedisRegistry(shared_redis.url.replace("//", "//nobody:secret@"))
        with pytest.raises(Unauthenticated, match="without the right user and password") as caught:
            registry.jobs()
        assert "secret" not in str(caught.value)
        registry.close()

    def test_a_user_without_the_right_to_its_keys_is_refused(self, shared_redis, raw: redis.Redis):
        raw.acl_setuser("guest", enabled=True, passwords=["+guest"], keys=["other"], reset=True)
        registry = RedisRegistry(shared_redis.url.replace("//", "//guest:guest@"))
        with pytest.raises(Unauthenticated):
            registry.jobs()
        registry.close()

    def test_a_server_without_memory_is_overloaded_and_keeps_what_it_has(self, own_redis):
        registry = RedisRegistry(own_redis.url)
        assert registry.swap(entry(), expected=ABSENT)
        with redis.Redis.from_url(own_redis.url) as raw:
            raw.config_set("maxmemory", 1)
        with pytest.raises(Overloaded, match="has no memory left"):
            registry.swap(entry(generation=2), expected=(1, "coordinator:1"))
        assert registry.read("job") == entry()
        registry.close()

    def test_a_key_of_somebody_else_is_not_touched(
        self, registry: RedisRegistry, key, raw: redis.Redis
    ):
        raw.set(key("events"), "somebody else's")
        with pytest.raises(Internal, match="does not do what it was asked to"):
            registry.append_event("job", "n", "t", {}, 0.0)
        assert raw.get(key("events")) == b"somebody else's"


@pytest.mark.parametrize(
    "url",
    ["", "localhost:6379", "http://host", "redis://user:secret@host:x/0", "redis://h:1/x?db=y"],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str):
    with pytest.raises(InvalidSettings, match="the registry's URL") as caught:
        RedisRegistry(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://user:secret@host:6379/3?password=secret", "redis://host:6379/3"),
        ("rediss://:p%40ss@host", "rediss://host"),
        ("redis://[::1]:6380/0", "redis://[::1]:6380/0"),
        ("unix://user:secret@/run/redis.sock?db=1", "unix:///run/redis.sock"),
    ],
)
def test_an_address_is_shown_without_its_password(url: str, address: str):
    registry = RedisRegistry(url)
    assert registry.address == address
    registry.close()


@pytest.mark.parametrize("prefix", ["", "{a}", "a}b"])
def test_a_prefix_that_would_break_the_hash_tag_is_refused(prefix: str):
    with pytest.raises(InvalidSettings, match="cannot be a prefix of keys"):
        RedisRegistry("redis://host", prefix=prefix)
