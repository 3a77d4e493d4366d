import asyncio
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.http.fakes import a_job, a_shard, a_worker

from adashard.wire.errors import InvalidRequest
from adashard_server.http.pagination import page

NUMBERS = st.sets(st.integers(0, 60), max_size=40)


def key(number):
    return (number,)


def pages(items_at, limit):
    """All pages from first to last; `items_at(n)` are the items there when page n is asked for."""
    cursor, seen = None, []
    for number in range(100):
        shown, cursor = page(items_at(number), key, limit=limit, cursor=cursor)
        seen.append(shown)
        if cursor is None:
            return seen
    raise AssertionError("the pages have no end")


@given(NUMBERS, st.integers(1, 50))
def test_pages_hold_every_item_once_and_in_order(numbers, limit):
    seen = pages(lambda _: numbers, limit)
    assert [number for shown in seen for number in shown] == sorted(numbers)
    assert all(len(shown) <= limit for shown in seen)
    assert len(seen) == max(1, -(-len(numbers) // limit))


@given(NUMBERS, NUMBERS, st.integers(1, 7))
def test_who_stays_is_seen_once_whoever_comes_and_goes(stay, others, limit):
    seen = pages(lambda number: stay | others if number % 2 else stay, limit)
    flat = [number for shown in seen for number in shown]
    assert len(flat) == len(set(flat))
    assert stay <= set(flat)


@given(st.text(max_size=30))
def test_a_cursor_of_somebody_else_is_refused_and_nothing_breaks(cursor):
    with suppress(InvalidRequest):
        shown, _ = page({"a", "b"}, lambda name: (name,), limit=1, cursor=cursor)
        assert set(shown) <= {"a", "b"}


@given(st.integers(-(10**6), 10**6))
def test_a_limit_is_clamped(limit):
    shown, _ = page(range(2000), key, limit=limit, cursor=None)
    assert len(shown) == min(max(limit, 1), 1000)


def test_shards_tell_what_they_hold(get, view):
    view.shards = [a_shard(1, versions={}), a_shard(0, versions={"demo": 41, "other": 50})]
    first, second = get("/api/v1/shards").json()["items"]
    assert (first["index"], second["index"]) == (0, 1)
    assert first["bytes"] == first["weight_bytes"] + sum(first["state_bytes"].values())
    assert first["versions"] == {"demo": 41, "other": 50}
    assert (first["version"], second["version"]) == (50, None)
    expected = {"id": "shard-0", "address": "127.0.0.1:50052", "pid": 4100, "device": "cpu"}
    assert expected.items() <= first.items()


def test_workers_come_by_job_and_rank_and_those_without_a_rank_last(get, view):
    view.workers = [
        a_worker(None, id="w-late", version=-1, status="joining"),
        a_worker(1),
        a_worker(0),
        a_worker(0, id="w-b", job="b"),
    ]
    view.jobs = [a_job("demo"), a_job("b")]
    everyone = get("/api/v1/workers").json()["items"]
    assert [one["id"] for one in everyone] == ["w-b", "worker-0", "worker-1", "w-late"]
    assert [one["step"] for one in everyone] == [41, 41, 41, None]
    assert [one["id"] for one in get("/api/v1/workers?job=b").json()["items"]] == ["w-b"]
    assert get("/api/v1/workers?job=c").json()["code"] == "UnknownJob"


def test_a_list_goes_on_where_its_cursor_says(get, view):
    view.jobs = [a_job(name) for name in "abc"]
    first = get("/api/v1/jobs?limit=2").json()
    assert [job["name"] for job in first["items"]] == ["a", "b"]
    rest = get("/api/v1/jobs", params={"cursor": first["next_cursor"]}).json()
    assert [job["name"] for job in rest["items"]] == ["c"]
    assert rest["next_cursor"] is None


@pytest.mark.parametrize("path", ["jobs", "shards", "workers"])
def test_a_cursor_of_another_list_is_refused(get, path):
    answer = get(f"/api/v1/{path}?cursor=bm8")
    assert (answer.status_code, answer.json()["code"]) == (400, "InvalidRequest")


def test_the_cluster_at_a_glance(get, view):
    view.not_ready = ("1 of 2 shards has joined",)
    cluster = get("/api/v1/cluster").json()
    assert cluster["address"] == "127.0.0.1:50051"
    assert (cluster["ready"], cluster["not_ready"]) == (False, ["1 of 2 shards has joined"])
    assert (cluster["shard_count"], cluster["worker_count"], cluster["job_count"]) == (2, 2, 1)


def test_every_route_runs_in_the_thread_that_owns_the_coordinator(get, view, app, training):
    training.run(3)
    paths = [
        route
        for route, methods in app.openapi()["paths"].items()
        if "get" in methods and not route.endswith("/events") and "{code}" not in route
    ]

    def in_one_thread():
        import threading

        view.thread = threading.get_ident()
        return [get(path.replace("{job}", "demo")).status_code for path in paths]

    assert set(asyncio.run(asyncio.to_thread(in_one_thread))) == {200}
