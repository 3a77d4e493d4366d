"""Workers that push into pure rounds, in whatever order a test chooses."""

from __future__ import annotations

import random

from hypothesis import strategies as st
from tests.shard import jobs
from tests.shard.clusters import Node, pieces

from adashard.wire.messages import Entry
from adashard.wire.placement import cut
from adashard.wire.spec import EpsPlacement

SHAPES = ((3, 2), (5,), ())
SPEC = jobs.spec(*SHAPES)
COUNTS = (6, 5, 1)

presences = st.sets(st.sampled_from(range(len(SHAPES))))
dice = st.integers(0, 2**32 - 1).map(random.Random)


bounds = st.sampled_from([0.0, 3.0])


@st.composite
def entries(draw) -> Entry:
    """Generations of a job whose larger parameters may be cut, placed anyhow."""
    job = jobs.spec(
        *SHAPES,
        (2, 20),
        (33,),
        slice_bytes=draw(st.sampled_from([64, 1 << 20])),
        eps_placement=draw(st.sampled_from([EpsPlacement.ADDED, EpsPlacement.CLAMPED])),
    )
    slices = len(cut(job))
    owners = draw(st.lists(st.integers(0, 3), min_size=slices, max_size=slices))
    used = sorted(set(owners))
    return jobs.entry(
        job,
        workers="ab",
        shards=[f"s{owner}" for owner in used],
        placement=[used.index(owner) for owner in owners],
    )


def opened(**options) -> Node:
    """A shard that holds all of the job at version 0 and collects step 1."""
    node = Node("s0")
    node.open(jobs.plan(jobs.entry(SPEC, **options)))
    return node


class Pusher:
    """A worker's push to one node: cut anywhere, and begun again at any time."""

    def __init__(self, node, begin, present, chooser) -> None:
        self.node, self.begin, self.present, self.chooser = node, begin, present, chooser
        self.todo: list[tuple[int, int, int]] | None = None

    @property
    def done(self) -> bool:
        return self.todo == []

    def act(self) -> None:
        """Begins, begins again, or sends the next piece if it is its turn."""
        if self.todo is None or self.chooser.random() < 0.15:
            complete = self.node.begin(self.begin)
            self.todo = [] if complete else self._pieces()
        elif self.node.push(self.begin, *self.todo[0]):
            self.todo.pop(0)

    def _pieces(self) -> list[tuple[int, int, int]]:
        mine = [i for i in self.node.rounds.mine if i in self.present]
        self.chooser.shuffle(mine)
        slices = self.node.rounds.slices
        return [piece for index in mine for piece in pieces(slices[index], self.chooser)]


def act_until_done(pushers: list[Pusher], chooser) -> None:
    for _ in range(10_000):
        waiting = [pusher for pusher in pushers if not pusher.done]
        if not waiting:
            return
        chooser.choice(waiting).act()
    raise AssertionError("the pushes of a round wait for each other")
