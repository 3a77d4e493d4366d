"""A session tells the coordinator which shards do not acknowledge what they are asked."""

from __future__ import annotations

import pytest
from tests.client.fakes import honest

from adashard.transport.links import LEASES
from adashard.wire.errors import ShardUnavailable
from adashard.wire.frames import leading_frame
from adashard.wire.messages import Acknowledge

pytestmark = pytest.mark.usefixtures("no_waits")


class Clock:
    """Seconds, in the test's hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def play(stage):
    """A session in an open generation; `clock` is what its links go by."""
    play = stage()
    play.clock = play.session._streams.links._clock = Clock()
    play.open()
    return play


def broken(play) -> tuple[str, ...]:
    return play.session._renewal().broken_links


def test_a_shard_that_acknowledges_nothing_for_three_leases_is_named_until_it_does(play):
    told: list[tuple[str, ...]] = []

    def hears_nothing(shard, begin, frames):
        play.clock.now += LEASES * 15.0 / 2
        told.append(broken(play))
        raise ShardUnavailable("the connection is refused")
        yield

    def answers(shard, begin, frames):
        told.append(broken(play))
        yield from honest(shard, begin, frames)

    play.shards[0].script = [hears_nothing, hears_nothing, answers]
    assert play.step()
    assert told == [(), ("s0",), ("s0",)]
    assert broken(play) == ()


def test_a_shard_that_has_acknowledged_may_take_as_long_as_the_round_does(play):
    def waits_for_others(shard, begin, frames):
        yield leading_frame(Acknowledge(version=0))
        play.clock.now += 1e6
        assert broken(play) == ()
        yield from honest(shard, begin, frames)

    play.shards[0].script = [waits_for_others]
    assert play.step()
