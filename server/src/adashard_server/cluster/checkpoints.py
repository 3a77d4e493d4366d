"""Which checkpoints there are, which one a job goes on from, and which are removed. Pure.

When one is cut is decided in `cutting.py`.

A job's history is the line of lineages that its weights have come down: the one in force, the one
that its checkpoint was cut of, and so on. Only what belongs to it is ever restored or removed, so
a run that begins anew under an old name leaves the old one's checkpoints alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from adashard.wire.messages import Lineage, Record
from adashard.wire.spec import JobSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSettings:
    """When checkpoints are cut, and which are kept.

    Attributes:
        every_steps: one at every multiple of this; 0 for none but those that are asked for.
        keep_last: how many of the newest are kept; 0 keeps all.
        keep_best: how many with the least loss are kept beside them.
    """

    every_steps: int = 0
    keep_last: int = 3
    keep_best: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What decisions need to know of a complete checkpoint.

    Attributes:
        job: whose.
        name: unique in its job.
        version: steps that its slices have taken.
        generation: the one in which it was cut.
        lineage: of which it was cut.
        spec: the job, with the `slice_bytes` that its slices were cut by.
        record: of step `version`, without partials; None where nothing has been stepped.
        loss: what workers had logged for it; None where none had, or it was not finite.
        finite: whether weights, state and what was logged are.
        kept: whether it was asked for, and is never removed.
        readable: whether no shard has failed to read it.
    """

    job: str
    name: str
    version: int
    generation: int
    lineage: Lineage
    spec: JobSpec
    record: Record | None = None
    loss: float | None = None
    finite: bool = True
    kept: bool = False
    readable: bool = True

    @property
    def usable(self) -> bool:
        """Whether a job can go on from it."""
        return self.finite and self.readable


class Checkpoints:
    """All complete checkpoints of a cluster, as far as it goes on from them. Not thread-safe.

    Args:
        settings: when they are cut and which are kept.
        known: those in the directory.
        taken: names of what is no checkpoint any more, of whichever job.
        resume: by job, the name of the checkpoint that it begins with; the empty name for its
            newest, and the empty job for every job.
        directory: as the coordinator's machine calls it; empty for none.
        mark: name of the file in it that shards have to see.
    """

    def __init__(
        self,
        settings: CheckpointSettings | None = None,
        known: Iterable[Checkpoint] = (),
        *,
        taken: Iterable[str] = (),
        resume: Mapping[str, str] | None = None,
        directory: str = "",
        mark: str = "",
    ) -> None:
        self.settings = settings or CheckpointSettings()
        self.directory, self.mark = directory, mark
        self._known: dict[str, dict[str, Checkpoint]] = {}
        self._taken = set(taken)
        self._resume = dict(resume or {})
        for one in known:
            self.add(one)

    def of(self, job: str) -> Collection[Checkpoint]:
        """Those of a job."""
        return self._known.get(job, {}).values()

    def add(self, checkpoint: Checkpoint) -> None:
        """One has been completed."""
        self._known.setdefault(checkpoint.job, {})[checkpoint.name] = checkpoint

    def remove(self, job: str, name: str) -> None:
        """One is being removed; its name is not used again."""
        if self._known.get(job, {}).pop(name, None) is not None:
            self._taken.add(name)

    def unreadable(self, job: str, name: str) -> None:
        """A shard could not read one: nothing goes on from it any more."""
        if (one := self.named(job, name)) is not None:
            self.add(replace(one, readable=False))

    def named(self, job: str, name: str) -> Checkpoint | None:
        """The one of this name."""
        return self._known.get(job, {}).get(name)

    def newest(self, job: str, lineage: Lineage | None) -> Checkpoint | None:
        """The one that a job goes on from where the state of `lineage` is lost; see `newest`."""
        return newest(self.of(job), lineage)

    def resumable(self, job: str) -> Checkpoint | None:
        """The one that a job is to begin with; None where none was asked for, or there is none."""
        wanted = self._resume.get(job, self._resume.get(""))
        if wanted is None:
            return None
        return self.named(job, wanted) if wanted else newest(self.of(job), None)

    def generation(self, job: str) -> int:
        """The highest in which any was cut: lineages that begin above it are the newer ones."""
        return max((one.generation for one in self.of(job)), default=0)

    def free_name(self, job: str, version: int) -> str:
        """A name for a checkpoint of `version` that none of the job has, or had."""
        used = self._known.get(job, {}).keys() | self._taken
        name = f"step-{version}"
        return next(
            one
            for one in (name, *(f"{name}.{n}" for n in range(2, len(used) + 3)))
            if one not in used
        )


def newest(known: Collection[Checkpoint], lineage: Lineage | None) -> Checkpoint | None:
    """The checkpoint that a job goes on from; never one that is not finite or cannot be read.

    Args:
        known: all of the job.
        lineage: the one whose state is lost: its own newest, else the one that it came from, else
            the one before that. None where a cluster begins: the newest of the newest lineage.
    """
    usable = [one for one in known if one.usable]
    if lineage is not None:
        origin = _named(known, lineage.checkpoint)
        own = [one for one in usable if one.lineage.number == lineage.number]
        usable = own or [one for one in usable if origin is not None and _leads_to(one, origin)]
    return max(usable, key=_age, default=None)


def superfluous(
    known: Collection[Checkpoint], lineage: Lineage, settings: CheckpointSettings
) -> list[Checkpoint]:
    """What may be removed, oldest first.

    What a job could go on from is never among them, nor the last finite one.

    Args:
        known: all of the job.
        lineage: the one in force.
        settings: how many are kept.
    """
    if not settings.keep_last:
        return []
    history = sorted(
        (one for one in known if one.lineage.number in _history(known, lineage)), key=_age
    )
    staying = {one.name for one in history if one.kept}
    staying |= {one.name for one in history[-settings.keep_last :]}
    staying |= {one.name for one in best(history)[: settings.keep_best]}
    staying |= {one.name for one in (newest(history, None), newest(history, lineage)) if one}
    return [one for one in history if one.name not in staying]


def best(known: Collection[Checkpoint]) -> list[Checkpoint]:
    """Checkpoints with a loss, the least first; of equals the older one."""
    scored = [(one.loss, _age(one), one) for one in known if one.usable and one.loss is not None]
    return [one for _, _, one in sorted(scored, key=lambda entry: entry[:2])]


def _age(one: Checkpoint) -> tuple[int, int]:
    """Lineages follow each other in number, whatever versions they have come to."""
    return one.lineage.number, one.version


def _leads_to(one: Checkpoint, later: Checkpoint) -> bool:
    """Whether one is at or before another one in its lineage."""
    return one.lineage.number == later.lineage.number and one.version <= later.version


def _history(known: Collection[Checkpoint], lineage: Lineage) -> set[int]:
    return set(_line(known, lineage))


def _line(known: Collection[Checkpoint], lineage: Lineage | None) -> Iterator[int]:
    """Numbers of the lineages that lead to this one, the newest first."""
    while lineage is not None:
        yield lineage.number
        before = _named(known, lineage.checkpoint)
        older = before is not None and before.lineage.number < lineage.number
        lineage = before.lineage if before is not None and older else None


def _named(known: Collection[Checkpoint], name: str) -> Checkpoint | None:
    return next((one for one in known if one.name == name), None)
