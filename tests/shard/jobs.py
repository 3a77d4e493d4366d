"""Small jobs, and the messages that a coordinator and workers would send about them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from adashard.wire.messages import (
    AdafactorStep,
    Begin,
    Entry,
    GroupStep,
    Lineage,
    Member,
    Plan,
    Record,
    Schedule,
    Source,
)
from adashard.wire.placement import DEFAULT_SLICE_BYTES, cut
from adashard.wire.spec import AdafactorLayout, Group, JobSpec, Parameter, Recovery

JOB = "job"


def spec(
    *shapes: tuple[int, ...], slice_bytes: int = DEFAULT_SLICE_BYTES, **layout: Any
) -> JobSpec:
    """A job with a parameter of each shape, in one group of this layout."""
    return JobSpec(
        parameters=tuple(
            Parameter(name=f"p{index}", shape=shape) for index, shape in enumerate(shapes)
        ),
        groups=(Group(adafactor=AdafactorLayout(**layout)),),
        slice_bytes=slice_bytes,
        min_workers=1,
        recovery=Recovery.CHECKPOINT if layout.get("momentum") else Recovery.WORKERS,
    )


def entry(
    job: JobSpec,
    *,
    generation: int = 1,
    workers: Sequence[str] = ("a",),
    shards: Sequence[str | Member] = ("s0",),
    placement: Sequence[int] | None = None,
    leaving: Collection[str] = (),
    lineage: int = 1,
    origin: str = "a",
) -> Entry:
    """A generation; a worker's rank is the place of its name in the alphabet."""
    if placement is None:
        placement = [index % len(shards) for index in range(len(cut(job)))]
    return Entry(
        job=JOB,
        generation=generation,
        author=f"c/{generation}",
        spec=job,
        workers=tuple(
            Member(id=name, rank=ord(name[0]) - ord("a"), leaving=name in leaving)
            for name in workers
        ),
        shards=tuple(one if isinstance(one, Member) else Member(id=one) for one in shards),
        placement=tuple(placement),
        lineage=Lineage(number=lineage, origin=origin) if lineage else None,
    )


def plan(entry: Entry, base: int = 0, record: Record | None = None, sources: bool = False) -> Plan:
    """What a generation begins with; with `sources`, all slices come from the lineage's origin."""
    named = (
        Source(slice=index, member=entry.lineage.origin, version=base)
        for index in range(len(entry.placement))
        if entry.lineage and sources
    )
    return Plan(entry=entry, base=base, record=record, sources=tuple(named))


def bits(present: Collection[int], count: int) -> bytes:
    """One bit per parameter, least significant first."""
    return sum(1 << index for index in present).to_bytes((count + 7) // 8, "little")


def group_step(counts: Collection[int] = range(1, 10), **settings: Any) -> GroupStep:
    """Settings for every step count that a short test reaches."""
    defaults = {"eps1": 1e-30, "eps2": 1e-3, "clip_threshold": 1.0}
    return GroupStep(
        adafactor=AdafactorStep(**(defaults | settings)),
        schedules=tuple(
            Schedule(step_count=count, beta2=1.0 - count**-0.8, rho=0.01) for count in counts
        ),
    )


def begin(
    entry: Entry,
    sender: str,
    step: int = 1,
    *,
    receiver: str = "s0",
    push: bool = True,
    present: Collection[int] | None = None,
    sparse: Collection[int] = (),
    groups: tuple[GroupStep, ...] | None = None,
    **others: Any,
) -> Begin:
    """A push, of all parameters unless `present` says otherwise, or a pull."""
    count = len(entry.spec.parameters)
    return Begin(
        job=JOB,
        generation=entry.generation,
        sender=sender,
        receiver=receiver,
        step=step,
        push=push,
        present=bits(range(count) if present is None else present, count) if push else b"",
        sparse=bits(sparse, count) if sparse else b"",
        groups=(group_step(),) * len(entry.spec.groups) if groups is None else groups,
        **others,
    )
