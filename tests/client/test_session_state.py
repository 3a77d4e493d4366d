"""A session that brings a state along, and one that fetches the job's."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from tests.client.fakes import WAIT_S, honest, read, record
from tests.client.stage import SPEC
from tests.client.states import frames_of, receive, same, state_of
from tests.shard import jobs

from adashard.push import Replies
from adashard.state import Gathering
from adashard.wire.control import Hello, Open, Opened, PlanRequest
from adashard.wire.errors import InvalidRequest, JobExists, ShardUnavailable, StaleGeneration
from adashard.wire.frames import Frame, leading_frame, read_frame
from adashard.wire.messages import Acknowledge, Entry, Lineage
from adashard.wire.placement import cut
from adashard.wire.spec import DType, Rounding

pytestmark = pytest.mark.usefixtures("no_waits")

LOADED = state_of(SPEC, version=3)


def holds(state, weights=0.0):
    """A handler that answers one request for the state of `state.version`."""

    def handler(shard, begin, frames):
        assert begin.state
        assert not begin.push
        assert (begin.step, begin.dtypes) == (state.version, (DType.FLOAT32,))
        yield leading_frame(Acknowledge(version=state.version, complete=True))
        assert read(frames) == {}
        yield leading_frame(state.record())
        tensors = [torch.full((4 - index,), weights) for index in range(2)]
        yield from frames_of(state, tensors, cut(SPEC), sorted(shard.weights))

    return handler


def from_state(entry: Entry, state, origin: str) -> Entry:
    """The generation of a job that has begun with a state."""
    lineage = Lineage(
        number=1, origin=origin, base_version=state.version, fingerprint=state.fingerprint()
    )
    return replace(entry, lineage=lineage)


# --- fetching ------------------------------------------------------------------------------------


def test_the_state_of_a_job_is_put_together_from_all_its_shards(stage):
    play = stage(shards=2)
    play.open()
    play.step()
    here = replace(LOADED, version=1, step_counts=(1, 1))
    for shard in play.shards:
        shard.script = [holds(here)]
    assert same(play.session.state(), here)
    assert play.step(), "and the job goes on"
    assert play.values == [-2.0, -2.0]


def test_fetching_state_touches_no_weights(stage):
    play = stage()
    play.open()
    play.step()
    play.shards[0].script = [holds(replace(LOADED, version=1), weights=99.0)]
    play.session.state()
    assert play.values == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("dtype", "replies", "masters"),
    [
        (torch.float32, Replies(), set()),
        (torch.bfloat16, Replies(), {0, 1}),
        (torch.bfloat16, Replies(dtype=torch.float32), {0, 1}),
        (torch.float32, Replies(dtype=torch.float16), {0, 1}),
    ],
)
def test_masters_are_kept_where_weights_come_to_the_worker_rounded(stage, dtype, replies, masters):
    play = stage(replies=replies)
    play.session._parameters = tuple(one.to(dtype) for one in play.parameters)
    play.open()
    play.shards[0].script = [holds(replace(LOADED, version=0), weights=0.1)]
    state = play.session.state()
    assert state.masters.keys() == masters
    assert all(master.dtype is torch.float32 for master in state.masters.values())
    assert all(master.unique().tolist() == [torch.tensor(0.1)] for master in state.masters.values())


def test_a_stream_of_state_that_breaks_is_repeated(stage):
    play = stage()
    play.open()
    here = replace(LOADED, version=0, step_counts=(0, 0))

    def breaks(shard, begin, frames):
        whole = holds(here)(shard, begin, frames)
        yield next(whole)
        yield next(whole)
        raise ShardUnavailable("broken")

    play.shards[0].script = [breaks, holds(here)]
    assert same(play.session.state(), here)


def test_a_generation_that_ends_meanwhile_has_the_state_fetched_in_the_next(stage):
    play = stage()
    play.open()
    play.step()
    here = replace(LOADED, version=1)

    def cut_off(shard, begin, frames):
        yield leading_frame(Acknowledge(version=1))
        play.freeze(generation=2)
        play.control.say(Open(plan=jobs.plan(play.entry(2), 1, record(1))))
        yield leading_frame(here.record())
        raise AssertionError("it reads on")

    play.shards[0].script = [cut_off, holds(here)]
    assert same(play.session.state(), here)
    assert [begin.generation for begin in play.shards[0].begins] == [1, 1, 2]


def test_a_shard_that_refuses_ends_the_fetching_and_not_the_session(stage):
    play = stage()
    play.open()

    def refuses(shard, begin, frames):
        raise InvalidRequest("no")
        yield

    play.shards[0].script = [refuses]
    with pytest.raises(InvalidRequest, match="no"):
        play.session.state()
    assert play.step()


# --- bringing along ------------------------------------------------------------------------------


def test_hello_says_what_was_loaded(stage):
    hello = stage(loaded=LOADED).transport.hear(Hello)
    assert (hello.worker.version, hello.worker.fingerprint) == (3, LOADED.fingerprint())
    fresh = stage().transport.hear(Hello)
    assert (fresh.worker.version, fresh.worker.fingerprint) == (0, "")


def test_the_origin_begins_the_job_at_the_version_with_weights_and_state(stage):
    play = stage(shards=2, loaded=replace(LOADED, masters={0: torch.full((4,), 0.1)}))
    play.parameters[1].fill_(5.0)
    entry = from_state(play.entry(), LOADED, play.session.id)
    plan = jobs.plan(entry, 3, LOADED.record(), sources=True)
    frozen = play.freeze_with(entry)
    assert (set(frozen.versions), frozen.record, frozen.complete) == ({3}, LOADED.record(), True)
    uploads: dict[str, list[Frame]] = {}
    uploaded = threading.Semaphore(0)

    def upload(address, frames):
        uploads[address] = [read_frame(data) for data in frames]
        uploaded.release()

    play.transport.upload = upload
    play.control.say(PlanRequest(plan=plan))
    assert all(uploaded.acquire(timeout=WAIT_S) for _ in play.shards)
    gathering = Gathering(SPEC, 3, masters={0, 1})
    for begin, *frames in uploads.values():
        assert (begin.leading.version, begin.leading.state) == (3, True)
        receive(gathering, (piece for frame in frames for piece in frame.pieces()))
    assert gathering.has([0, 1])
    came = gathering.state()
    assert came.masters[0].tolist() == torch.full((4,), 0.1).tolist()
    assert came.masters[1].tolist() == [5.0] * 3
    play.control.say(Open(plan=plan))
    play.transport.hear(Opened)
    for shard in play.shards:
        shard.version = 3
    assert play.step()
    assert (play.session.version, play.counts) == (4, [LOADED.step_counts])


def test_a_worker_with_the_same_state_joins_and_asks_for_nothing_more(stage):
    play = stage(loaded=LOADED)
    entry = from_state(play.entry(), LOADED, "other")
    play.freeze_with(entry)
    play.shards[0].version, play.shards[0].record = 3, LOADED.record()
    play.control.say(Open(plan=jobs.plan(entry, 3, LOADED.record())))
    assert play.step()
    asked = [(begin.step, begin.push) for begin in play.shards[0].begins]
    assert asked == [(3, False), (4, True)]
    assert play.counts == [LOADED.step_counts]


def test_a_job_that_has_come_to_the_same_state_is_joined_where_it_stands(stage):
    play = stage(loaded=LOADED)
    play.open(base=3, of=LOADED.record(), origin="other")
    play.shards[0].version, play.shards[0].record = 3, LOADED.record()
    play.shards[0].script = [holds(LOADED)]
    assert play.step()
    asked = [(begin.step, begin.push) for begin in play.shards[0].begins]
    assert asked == [(3, False), (3, False), (4, True)], "the state, the weights, a step"
    play.step()
    assert [begin.step for begin in play.shards[0].begins[3:]] == [5], "it is compared once"


@pytest.mark.parametrize("base", [3, 4])
def test_a_job_with_another_state_is_not_joined(stage, base):
    play = stage(loaded=LOADED)
    play.open(base=base, of=replace(LOADED, version=base).record(), origin="other")
    other = replace(LOADED, step_counts=(9, 9))
    play.shards[0].script = [holds(other)]
    with pytest.raises(JobExists, match=rf"at step {base}, .* of step 3 that was loaded"):
        play.step()
    assert not any(begin.push for begin in play.shards[0].begins)


def test_comparing_goes_on_in_the_next_generation(stage):
    play = stage(loaded=LOADED)
    play.open(base=3, of=LOADED.record(), origin="other")
    play.shards[0].version, play.shards[0].record = 3, LOADED.record()

    def not_yet(shard, begin, frames):
        raise StaleGeneration("frozen")
        yield

    play.shards[0].script = [not_yet, holds(LOADED), honest]
    assert play.step()


# --- what else a step says -----------------------------------------------------------------------


def test_how_weights_are_wanted_back_and_the_bound_of_the_norm_travel(stage):
    replies = Replies(dtype=torch.bfloat16, rounding=Rounding.STOCHASTIC, seed=7)
    play = stage(replies=replies)
    play.open()
    (shard,) = play.shards

    def listens(shard, begin, frames):
        raise InvalidRequest("heard")
        yield

    shard.script = [listens]
    with pytest.raises(InvalidRequest, match="heard"):
        play.session.step(replace(play.push(), max_grad_norm=0.5))
    (begin,) = shard.begins
    assert (begin.dtypes, begin.rounding, begin.seed) == (
        (DType.BFLOAT16,),
        Rounding.STOCHASTIC,
        7,
    )
    assert (begin.max_grad_norm, begin.sparse) == (0.5, b"\x00")


def test_slices_are_those_of_the_entry_whatever_the_worker_left_open(stage):
    play = stage()
    entry = replace(play.entry(), spec=replace(SPEC, slice_bytes=64), placement=(0, 0))
    play.freeze_with(entry)
    assert play.session._routed.slices == cut(entry.spec)
