"""Where a generation begins: from the answers to a freeze to a plan (rules C4 and C5). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from adashard.wire.control import Frozen
from adashard.wire.messages import Entry, Lineage, Plan, Record, Source
from adashard.wire.placement import cut
from adashard_server.cluster.instructions import Announce

CHECKPOINT = ""
"""Stands in a plan for the member that holds what a lineage's checkpoint supplies."""

Versions = dict[int, dict[str, int]]
"""By slice, the version that each holder has, or can have by itself."""


class Stored(Protocol):
    """What a lineage needs of the checkpoint that it begins from."""

    @property
    def name(self) -> str:
        """The checkpoint's, among those of its job."""

    @property
    def version(self) -> int:
        """At which all its slices were cut."""

    @property
    def record(self) -> Record | None:
        """That of its version; None where nothing had been stepped."""


class Archive(Protocol):
    """The checkpoints that there are, of all jobs."""

    def newest(self, job: str, lineage: Lineage) -> Stored | None:
        """The newest finite checkpoint of a lineage, else the one that the lineage came from."""

    def named(self, job: str, name: str) -> Stored | None:
        """One checkpoint; None if it is not there any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """No plan can be made: nobody has a copy of `slice_index` that is recent enough."""

    slice_index: int
    version: int

    def why(self, entry: Entry) -> str:
        """The sentence for people."""
        if self.version < 0:
            return "nobody holds any of its weights any more"
        name = entry.spec.parameters[cut(entry.spec)[self.slice_index].parameter].name
        return f"nobody holds slice {self.slice_index} ({name!r}) at step {self.version} any more"


def reconcile(
    entry: Entry, answers: Mapping[str, Frozen], record: Record | None = None
) -> Plan | Lost:
    """The plan of `entry`'s generation.

    The base is the highest version that anybody holds of any slice. A shard's slice one version
    behind counts as at the base where it holds the full sums of that step: it applies the record
    by itself. A slice that its shard lacks is copied from another shard, else from a worker; each
    from whoever has it at its highest version, as no one may have all. A slice that nobody has at
    the base takes the base step again, from the pushes of those who took part in it.

    Args:
        entry: membership and placement; its lineage names whose copies count.
        answers: of all members, by id.
        record: that of the lineage's base version, where a checkpoint supplies it.
    """
    lineage = entry.lineage
    assert lineage is not None
    counted = {
        member: answer for member, answer in answers.items() if answer.lineage == lineage.number
    }
    held = [max(answer.versions, default=-1) for answer in counted.values()]
    stored = lineage.base_version if lineage.checkpoint else -1
    base = max(*held, stored) if held else stored
    known = _record_of(base, counted) or (record if base == stored else None)
    holders = _holders(base, known, counted)
    if lineage.checkpoint:
        for index in range(len(entry.placement)):
            holders.setdefault(index, {})[CHECKPOINT] = stored
    return _plan(entry, base, known, holders)


def rebuilt(plan: Plan) -> list[Announce]:
    """What of a plan brings back state that a shard has lost; nothing where there is none."""
    workers = {worker.id for worker in plan.entry.workers}
    taken = [source.member for source in plan.sources if source.member in workers]
    if not taken:
        return []
    count = len(set(taken))
    whose = f"{count} workers" if count > 1 else f"worker {taken[0]}"
    text = f"{len(taken)} slices are rebuilt from the memory of {whose}"
    return [Announce(plan.entry.job, "rebuilt", text, {"slices": str(len(taken))})]


def _plan(entry: Entry, base: int, record: Record | None, holders: Versions) -> Plan | Lost:
    """Each slice's highest version, and where it comes from."""
    order = [member.id for member in (*entry.shards, *entry.workers)] + [CHECKPOINT]
    sources, behind = [], []
    for index, owner in enumerate(entry.placement):
        holding = holders.get(index, {})
        target = max(holding.values(), default=-1)
        if target < 0 or target < base - 1 or (target < base and record is None):
            return Lost(slice_index=index, version=base)
        if target < base:
            behind.append(index)
        if holding.get(entry.shards[owner].id, -1) < target:
            member = next(one for one in order if holding.get(one, -1) == target)
            sources.append(Source(slice=index, member=member, version=target))
    return Plan(entry=entry, base=base, record=record, sources=tuple(sources), behind=tuple(behind))


def _record_of(base: int, answers: Mapping[str, Frozen]) -> Record | None:
    """The record of the base, from a member that holds a slice at it."""
    for answer in answers.values():
        if answer.record is not None and answer.record.step == base and base in answer.versions:
            return answer.record
    return None


def _holders(base: int, record: Record | None, answers: Mapping[str, Frozen]) -> Versions:
    """Who holds what; a shard's full sums of the base step count as the step taken."""
    holders: Versions = {}
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
