"""What a failed write means: another coordinator, or a registry that has lost what it held (C1)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cluster.scenes import SPEC

from adashard.wire.messages import Entry
from adashard_server.cluster.instructions import Swap
from adashard_server.cluster.registry import ABSENT, MemoryRegistry, identity_of
from adashard_server.cluster.writes import Writes

NEW = Entry(job="job", generation=0, author="", spec=SPEC)


def an_entry(generation: int, author: str) -> Entry:
    return replace(NEW, generation=generation, author=author)


def carry_out(registry: MemoryRegistry, writes: Writes, swap: Swap) -> Entry | None:
    """Writes as the coordinator's process does; what is stored then, None if it steps down."""
    answer: Entry | Swap | None = swap
    while isinstance(answer, Swap):
        done = registry.swap(answer.entry, expected=answer.expected)
        answer = writes.answered(done, None if done else registry.read("job"))
    return answer


def registry_with(entry: Entry | None) -> MemoryRegistry:
    registry = MemoryRegistry()
    if entry is not None:
        registry.swap(entry, expected=ABSENT)
    return registry


@given(
    begins=st.sampled_from([NEW, an_entry(4, "before/2")]),
    losses=st.lists(st.integers(0, 9), max_size=8),
)
def test_whatever_a_registry_loses_its_only_coordinator_goes_on(begins: Entry, losses: list[int]):
    history = [begins if begins.author else None]
    writes = Writes("c", begins)
    for generation, lost in enumerate(losses, start=5):
        left = history[max(0, len(history) - 1 - lost)]  # of what it held, the newest are gone
        registry = registry_with(left)
        stored = carry_out(registry, writes, writes.begin(an_entry(generation, "")))
        assert stored is not None
        assert registry.read("job") == stored
        assert stored.generation == generation
        history.append(stored)


@given(st.integers(1, 9))
def test_another_author_is_never_written_over(generation: int):
    writes = Writes("c", an_entry(4, "before/2"))
    theirs = an_entry(generation, "other/1")
    registry = registry_with(theirs)
    assert carry_out(registry, writes, writes.begin(an_entry(5, ""))) is None
    assert registry.read("job") == theirs
    assert writes.pending is None


def test_a_write_whose_answer_was_lost_is_known_by_its_author():
    writes = Writes("c", NEW)
    swap = writes.begin(an_entry(1, ""))
    assert writes.answered(False, swap.entry) == swap.entry
    assert writes.begin(an_entry(2, "")).expected == identity_of(swap.entry)


@pytest.mark.parametrize("entry", [NEW, an_entry(4, "before/2")])
def test_every_write_has_an_author_of_its_own_and_expects_the_one_before(entry: Entry):
    writes = Writes("c", entry)
    assert not writes.begun
    expected = identity_of(entry) if entry.author else ABSENT
    for number in (1, 2, 3):
        swap = writes.begin(an_entry(4 + number, ""))
        assert writes.begun
        assert (swap.expected, swap.entry.author) == (expected, f"c/{number}")
        expected = identity_of(swap.entry)
        assert writes.answered(True, None) == swap.entry
