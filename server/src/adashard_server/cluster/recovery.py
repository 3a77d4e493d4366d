"""Where a generation begins: from the answers to a freeze to a plan (rule C4). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adashard.wire.control import Frozen
from adashard.wire.messages import Entry, Plan, Record, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """No plan can be made: nobody has a copy of `slice_index` that is recent enough."""

    slice_index: int
    version: int


def reconcile(entry: Entry, answers: Mapping[str, Frozen]) -> Plan | Lost:
    """The plan of `entry`'s generation.

    The base is the highest version that anybody holds of any slice. A shard's slice one version
    behind counts as at the base where it holds the full sums of that step: it applies the record
    by itself. A slice that its shard lacks is copied from another shard, else from a worker.

    Args:
        entry: membership and placement; its lineage names whose copies count.
        answers: of all members, by id.
    """
    assert entry.lineage is not None
    counted = {
        member: answer
        for member, answer in answers.items()
        if answer.lineage == entry.lineage.number
    }
    base = max((max(a.versions, default=-1) for a in counted.values()), default=-1)
    record = _record_of(base, counted)
    holders = _holders(base, record, counted)
    sources = []
    for index, owner in enumerate(entry.placement):
        holding = holders.get(index, {})
        if max(holding.values(), default=-1) < base or base < 0:
            return Lost(slice_index=index, version=base)
        placed = entry.shards[owner].id
        if holding.get(placed, -1) < base:
            sources.append(Source(slice=index, member=_source(entry, holding, base), version=base))
    return Plan(entry=entry, base=base, record=record, sources=tuple(sources))


def _record_of(base: int, answers: Mapping[str, Frozen]) -> Record | None:
    """The record of the base, from a member that holds a slice at it."""
    for answer in answers.values():
        if answer.record is not None and answer.record.step == base and base in answer.versions:
            return answer.record
    return None


def _holders(
    base: int, record: Record | None, answers: Mapping[str, Frozen]
) -> dict[int, dict[str, int]]:
    """By slice, the version that each holder has, or can have by itself."""
    holders: dict[int, dict[str, int]] = {}
    for member, answer in answers.items():
        finishable = {
            index
            for sums in answer.sums
            if record is not None and (sums.step, sums.workers) == (base, record.workers)
            for index in sums.slices
        }
        for index, version in zip(answer.slices, answer.versions, strict=True):
            reaches = base if version == base - 1 and index in finishable else version
            holders.setdefault(index, {})[member] = reaches
    return holders


def _source(entry: Entry, holding: Mapping[str, int], base: int) -> str:
    """Who uploads a slice: the first shard that has it at the base, else the first worker."""
    members = [*entry.shards, *entry.workers]
    return next(member.id for member in members if holding.get(member.id, -1) == base)
