"""The rare moments that the protocol is about: which of them a run has come through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from adashard.wire.control import Frozen
from adashard.wire.messages import Plan


def windows_of(plan: Plan, answers: Mapping[str, Frozen]) -> Iterator[str]:
    """What was special about where a generation begins.

    Args:
        plan: of the generation.
        answers: of its members to the freeze.
    """
    lineage = plan.entry.lineage
    assert lineage is not None
    shards = {member.id for member in plan.entry.shards}
    counted = {m: a for m, a in answers.items() if a.lineage == lineage.number}
    from_workers = {source for source in plan.sources if source.member not in (*shards, "")}
    opened = plan.entry.opened
    if opened and plan.base > lineage.base_version:
        yield from _of_shards(plan, {m: a for m, a in counted.items() if m in shards})
    if from_workers:
        yield "a slice is rebuilt from a worker" if opened else "a job begins from a worker"
    if len({source.version for source in from_workers}) > 1:
        yield "a rebuild has two versions at once"
    if len({source.member for source in from_workers}) > 1:
        yield "a rebuild is from several workers"
    if any(source.member in shards for source in plan.sources):
        yield "a slice is moved from a shard"
    if any(source.member == "" for source in plan.sources):
        yield "a slice is read from a checkpoint"
    if plan.behind:
        yield "a decided step is finished from pushes"


def _of_shards(plan: Plan, answers: Mapping[str, Frozen]) -> Iterator[str]:
    versions = [version for answer in answers.values() for version in answer.versions]
    sums = [one for answer in answers.values() for one in answer.sums]
    if plan.base not in versions:
        yield "a step is known from workers only"
    if not versions:
        yield "all shards are empty at once"
    if any(one.step == plan.base + 1 for one in sums):
        yield "an undecided step has full sums"
    for member, answer in answers.items():
        held = dict(zip(answer.slices, answer.versions, strict=True))
        copied = {source.slice for source in plan.sources}
        finishes = {
            index
            for one in answer.sums
            if one.step == plan.base
            for index in one.slices
            if held.get(index) == plan.base - 1 and index not in copied
        }
        if finishes - set(plan.behind) and _placed(plan, member, finishes):
            yield "full sums kept by a shard finish a decided step"


def _placed(plan: Plan, member: str, indices: set[int]) -> bool:
    return any(plan.entry.shards[plan.entry.placement[index]].id == member for index in indices)
