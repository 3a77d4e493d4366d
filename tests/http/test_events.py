import asyncio
import re
from contextlib import ExitStack

import pytest
from tests.http.fakes import a_job, a_worker, an_event

from adashard.wire.control import Logged
from adashard.wire.errors import Overloaded
from adashard_server.http.events import POINTS_MAX, resume_after, watch
from adashard_server.http.streams import Streams


@pytest.fixture
def sources(app):
    return app.state.sources


@pytest.fixture
def listen(sources):
    """Read a stream to its end; between two looks the next of `changes` happens."""

    def listen(*changes, job=None, after=0):
        rest = list(changes)

        async def tick():
            if not rest:
                return False
            rest.pop(0)()
            return True

        async def read():
            stream = watch(sources, job=job, after=after, tick=tick)
            return [event async for event in stream if event.event is not None]

        return asyncio.run(read())

    return listen


def nothing():
    """Nothing changes between two looks."""


def kinds(events):
    return [event.event for event in events]


def of_kind(events, kind):
    return [event.data for event in events if event.event == kind]


def test_a_stream_begins_with_how_everything_stands(listen):
    (event,) = listen()
    status = event.data
    assert event.event == "status"
    assert status.cluster.address == "127.0.0.1:50051"
    assert [job.name for job in status.jobs] == ["demo"]
    assert len(status.shards) == len(status.workers) == 2


def test_it_says_how_everything_stands_at_every_fourth_look(listen):
    assert kinds(listen(*[nothing] * 8)) == ["status"] * 3


def test_steps_between_two_looks_come_together(listen, training):
    training.run(5)
    told = of_kind(listen(lambda: training.run(3), nothing, lambda: training.run(1)), "step")
    assert [[step.step for step in update.items] for update in told] == [[6, 7, 8], [9]]
    assert [update.latest_step for update in told] == [8, 9]
    assert told[0].job == "demo"
    assert told[0].steps_per_second > 0


def test_a_loss_that_comes_after_its_step_is_told_again(listen, training):
    training.run(5)
    late = Logged(job="demo", step=4, values={"accuracy": 0.5})
    (update,) = of_kind(listen(lambda: training.history.log(late)), "step")
    assert [(step.step, step.values["accuracy"]) for step in update.items] == [(4, 0.5)]


def test_a_burst_of_steps_is_thinned_and_keeps_its_last(listen, training):
    (update,) = of_kind(listen(lambda: training.run(900)), "step")
    assert len(update.items) <= POINTS_MAX
    assert update.items[-1].step == 900


def test_a_stream_of_one_job_has_its_steps_and_workers_and_events_of_the_cluster(
    listen, view, training
):
    view.jobs.append(a_job("other"))
    view.workers.append(a_worker(0, id="w-other", job="other"))
    view.told = [an_event(1, job="other"), an_event(2, job="demo"), an_event(3, job="")]
    events = listen(lambda: training.run(1), job="other")
    assert kinds(events) == ["membership", "membership", "status"]
    assert [event.sequence for event in of_kind(events, "membership")] == [1, 3]
    (status,) = of_kind(events, "status")
    assert [worker.id for worker in status.workers] == ["w-other"]
    assert [job.name for job in status.jobs] == ["demo", "other"]


def test_membership_events_are_told_once_and_in_order(listen, view):
    view.told = [an_event(1), an_event(2)]

    def join():
        view.told.append(an_event(3, name="shard_joined", job=""))

    told = of_kind(listen(nothing, join, nothing, after=1), "membership")
    assert [event.sequence for event in told] == [2, 3]


def test_only_membership_events_have_ids(listen, view, training, sources):
    view.told = [an_event(7)]
    events = listen(lambda: training.run(1))
    assert [e.id for e in events if e.event == "membership"] == [f"{sources.streams.epoch}-7"]
    assert all(event.id is None for event in events if event.event != "membership")


def test_a_reader_that_comes_back_gets_what_it_missed(sources, view):
    view.told = [an_event(number) for number in range(1, 10)]
    epoch = sources.streams.epoch
    assert resume_after(sources, f"{epoch}-4", None) == 4
    assert resume_after(sources, f"{epoch}-4", 0) == 4


@pytest.mark.parametrize("told", ["0-4", "4", "-", "x-y", "{}-", "{}-x", "{}-" + "9" * 5000])
def test_an_id_of_an_earlier_coordinator_or_of_nobody_means_everything_is_news(sources, view, told):
    view.told = [an_event(1)]
    assert resume_after(sources, told.format(sources.streams.epoch), 1) == 0


def test_a_new_reader_hears_what_happens_from_now_on_or_after_what_it_says(sources, view):
    assert resume_after(sources, None, None) == 0
    view.told = [an_event(number) for number in range(1, 10)]
    assert resume_after(sources, None, None) == 9
    assert resume_after(sources, None, 3) == 3


def test_streams_beyond_the_limit_are_refused_until_one_ends():
    streams = Streams("e", streams_max=2)
    with streams.slot():
        with streams.slot(), pytest.raises(Overloaded, match="2 event streams"), streams.slot():
            pass
        with streams.slot():
            pass


def test_streams_end_at_once_when_the_server_goes_away():
    streams = Streams("e", interval_s=3600)

    async def close():
        streams.close()

    async def close_while_waiting():
        still_there, _ = await asyncio.gather(streams.tick(), close())
        return still_there, await streams.tick()

    assert asyncio.run(close_while_waiting()) == (False, False)


def test_on_the_wire_an_event_is_a_kind_an_id_and_json(get, sources, view):
    sources.streams.close()
    view.told = [an_event(7)]
    answer = get("/api/v1/events?after=0")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    pattern = r"event: membership\ndata: {\"sequence\":7,.*}\nid: \w+-7\n\n"
    assert re.search(pattern, answer.text)
    assert answer.text.startswith(": adashard\nretry: 1000\n\n")
    again = get("/api/v1/events?after=0", headers={"last-event-id": f"{sources.streams.epoch}-7"})
    assert "event: membership" not in again.text
    assert "event: status" in again.text


def test_a_stream_of_a_job_that_is_not_there_is_refused(get, sources):
    sources.streams.close()
    assert get("/api/v1/jobs/nope/events").json()["code"] == "UnknownJob"
    assert get("/api/v1/events?job=nope").status_code == 200
    assert "event: status" in get("/api/v1/jobs/demo/events").text


def test_a_refused_stream_is_a_problem(get, sources):
    with ExitStack() as others:
        for _ in range(64):
            others.enter_context(sources.streams.slot())
        answer = get("/api/v1/events")
    assert (answer.status_code, answer.json()["code"]) == (429, "Overloaded")
