"""When a job's checkpoints are cut, and whether one has become whole. Pure; the clock is passed in.

The next checkpoint is asked for as soon as the one before is done, at the next multiple of
`every_steps`: shards know it long before they come there, and no step waits for the coordinator.
One that a person asks for is of the version that the job is at, or where that passes before all
shards have heard of it, of one a little ahead, twice as far at each attempt.

A checkpoint is complete when all slices of its version came from one generation; a new generation
voids what is unfinished (docs/protocol.md, rule C10).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from adashard.wire.control import Logged, SnapshotRequest, Snapshotted
from adashard.wire.errors import (
    AdashardError,
    CheckpointUnwritable,
    Internal,
    StaleGeneration,
    StepTimedOut,
)
from adashard.wire.messages import Entry, ErrorInfo
from adashard.wire.placement import cut
from adashard_server.cluster.checkpoints import Checkpoint, Checkpoints, superfluous
from adashard_server.cluster.instructions import (
    Announce,
    Commit,
    Discard,
    Instruction,
    Remove,
    Tell,
)

COMPLETED, FAILED = "checkpoint", "checkpoint_failed"
KEPT = "asked_for"
LOSS = "loss"
REPEAT_S = 5.0  # after which an unanswered request is sent again
WRITE_S_MAX = 3600.0  # that shards may take to write what they have cut
_AHEAD_MAX = 1024


@dataclass(slots=True)
class _Logged:
    """What workers have logged for the newest step that any of them has logged for."""

    step: int = -1
    by_worker: dict[str, Mapping[str, float]] = field(default_factory=dict)

    def take(self, worker: str, logged: Logged) -> None:
        if logged.step > self.step:
            self.step, self.by_worker = logged.step, {}
        if logged.step == self.step:
            self.by_worker[worker] = {**self.by_worker.get(worker, {}), **logged.values}

    def means(self) -> dict[str, float]:
        names = {name for values in self.by_worker.values() for name in values}
        found = {
            name: [values[name] for _, values in sorted(self.by_worker.items()) if name in values]
            for name in sorted(names)
        }
        return {name: sum(values) / len(values) for name, values in found.items()}


@dataclass(slots=True)
class _Cut:
    """One attempt at a checkpoint, from the first request to the last answer."""

    entry: Entry
    version: int
    name: str
    attempt: str
    kept: bool
    logged: _Logged
    parts: dict[str, Snapshotted] = field(default_factory=dict)
    reached_at: float | None = None
    committing: bool = False

    @property
    def waiting(self) -> list[str]:
        """Shards that have slices and have not answered."""
        return [shard for shard in _placed(self.entry) if shard not in self.parts]

    def request(self) -> SnapshotRequest:
        return SnapshotRequest(
            job=self.entry.job,
            generation=self.entry.generation,
            version=self.version,
            directory=self.attempt,
        )


class Cutting:
    """The checkpoints of one job, one at a time. Not thread-safe.

    Args:
        checkpoints: those of the cluster; completed ones are added, removed ones taken out.
        author: the coordinator's id, new at every start; attempts are named after it.
    """

    def __init__(self, checkpoints: Checkpoints, author: str) -> None:
        self._checkpoints, self._author = checkpoints, author
        self._cut: _Cut | None = None
        self._attempts = 0
        self._asked = False
        self._ahead = 0
        self._tried = (0, 0)  # lineage and version of the last attempt that has ended
        self._logged = _Logged()
        self._repeat_at = 0.0

    # --- what comes in --------------------------------------------------------------------------

    def ask(self) -> None:
        """A person wants a checkpoint now, which is never removed by itself."""
        self._asked, self._ahead = True, 0

    def logged(self, worker: str, logged: Logged) -> None:
        """A worker says what its loop has measured."""
        self._logged.take(worker, logged)
        if self._cut is not None and logged.step <= self._cut.version:
            self._cut.logged.take(worker, logged)

    def tick(self, entry: Entry, *, opened: bool, version: int, now: float) -> list[Instruction]:
        """Voids what is void, begins what is due, repeats what is not answered.

        Args:
            entry: the newest.
            opened: whether its generation is open.
            version: the newest that any shard has told of.
            now: seconds.
        """
        one = self._cut
        if one is not None and one.committing:
            return []
        instructions = list[Instruction]()
        if one is not None and not (opened and one.entry.generation == entry.generation):
            instructions += self._void(one)
        if opened:
            instructions += self._go_on(entry, version, now)
        return instructions

    def snapshotted(self, shard: str, answer: Snapshotted) -> list[Instruction]:
        """A shard has written its slices, or says why not."""
        one = self._cut
        if one is None or one.committing or shard not in one.waiting:
            return []
        if (answer.generation, answer.version) != (one.entry.generation, one.version):
            return []
        if answer.error is not None:
            return self._failed(one, answer.error)
        one.parts[shard] = answer
        return [] if one.waiting else self._complete(one)

    def stored(self, checkpoint: Checkpoint, error: AdashardError | None) -> list[Instruction]:
        """The disk has answered a `Commit`."""
        one, self._cut = self._cut, None
        assert one is not None
        assert one.entry.lineage is not None
        if error is not None:
            self._cut = one
            return self._failed(one, error.info())
        self._end(one)
        self._checkpoints.add(checkpoint)
        old = superfluous(
            self._checkpoints.of(checkpoint.job), one.entry.lineage, self._checkpoints.settings
        )
        for each in old:
            self._checkpoints.remove(each.job, each.name)
        return [_completed(one), *(Remove(each.job, each.name) for each in old)]

    # --- inside ---------------------------------------------------------------------------------

    def _go_on(self, entry: Entry, version: int, now: float) -> list[Instruction]:
        """Begins the next one where it is due; waits for the one that is under way."""
        one, target = self._cut, self._target(entry, version)
        if one is not None and self._asked and not one.parts and one.version > target:
            return [*self._void(one), *self._begin(entry, target, now)]
        if one is None:
            return self._begin(entry, target, now) if target > 0 or self._asked else []
        if version >= one.version and one.reached_at is None:
            one.reached_at = now
        if one.reached_at is not None and now - one.reached_at > WRITE_S_MAX:
            late = ", ".join(one.waiting)
            error = StepTimedOut(f"shards {late} have not written it in {WRITE_S_MAX:.0f} s")
            return self._failed(one, error.info())
        if now < self._repeat_at:
            return []
        self._repeat_at = now + REPEAT_S
        return [Tell(shard, one.request()) for shard in one.waiting]

    def _target(self, entry: Entry, version: int) -> int:
        """The version of the next checkpoint; 0 for none that is due by itself."""
        if self._asked:
            return version + self._ahead
        every = self._checkpoints.settings.every_steps
        if not every:
            return 0
        assert entry.lineage is not None
        lineage, tried = self._tried
        beyond = max(version, tried) if lineage == entry.lineage.number else version
        return (beyond // every + 1) * every

    def _begin(self, entry: Entry, version: int, now: float) -> list[Instruction]:
        self._attempts += 1
        name = self._checkpoints.free_name(entry.job, version)
        one = self._cut = _Cut(
            entry=entry,
            version=version,
            name=name,
            attempt=f"{name}.{self._author[:8]}-{self._attempts}",
            kept=self._asked,
            logged=replace(self._logged, by_worker=dict(self._logged.by_worker)),
        )
        self._asked, self._repeat_at = False, now + REPEAT_S
        return [Tell(shard, one.request()) for shard in one.waiting]

    def _void(self, one: _Cut) -> list[Instruction]:
        """Lets an attempt go; what a person has asked for is asked for again."""
        self._cut, self._asked, self._ahead = None, self._asked or one.kept, 0
        return [Discard(one.entry.job, one.attempt)]

    def _end(self, one: _Cut) -> None:
        assert one.entry.lineage is not None
        self._cut, self._tried = None, (one.entry.lineage.number, one.version)

    def _failed(self, one: _Cut, error: ErrorInfo) -> list[Instruction]:
        """A version that has passed is no failure: a later one is tried."""
        asked, ahead = self._asked, self._ahead
        discard = self._void(one)
        self._end(one)
        if error.reason == StaleGeneration.__name__:
            self._ahead = min(max(1, 2 * ahead), _AHEAD_MAX)
            return discard
        self._asked = asked  # not once more what has failed
        text = f"no checkpoint of step {one.version}: {error.message}"
        facts = {"version": str(one.version), "reason": error.reason, "remedy": error.remedy}
        facts[KEPT] = str(one.kept)
        return [*discard, Announce(one.entry.job, FAILED, text, {**error.metadata, **facts})]

    def _complete(self, one: _Cut) -> list[Instruction]:
        """All shards have answered: a checkpoint, if it is of every slice (C10)."""
        if wrong := _wrong(one):
            return self._failed(one, wrong.info())
        entry, first = one.entry, next(iter(one.parts.values()))
        assert entry.lineage is not None
        values = one.logged.means()
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        not_finite = (*_not_finite(one), *sorted(values.keys() - finite.keys()))
        one.committing = True
        checkpoint = Checkpoint(
            job=entry.job,
            name=one.name,
            version=one.version,
            generation=entry.generation,
            lineage=entry.lineage,
            spec=entry.spec,
            record=replace(first.record, partials=()) if first.record else None,
            loss=finite.get(LOSS),
            finite=not not_finite,
            kept=one.kept,
        )
        return [
            Commit(
                checkpoint=checkpoint,
                attempt=one.attempt,
                placement=entry.placement,
                files=tuple(file for part in one.parts.values() for file in part.files),
                values=finite,
                not_finite=not_finite,
            )
        ]


class Cuttings:
    """The checkpoints of all jobs. Not thread-safe.

    Args:
        checkpoints: those of the cluster.
        author: the coordinator's id, new at every start.
    """

    def __init__(self, checkpoints: Checkpoints, author: str) -> None:
        self._checkpoints, self._author = checkpoints, author
        self._jobs: dict[str, Cutting] = {}

    def ask(self, job: str) -> None:
        """A person wants a checkpoint of a job as it is now; events tell how it goes.

        Raises:
            CheckpointUnwritable: the cluster has no directory of checkpoints.
        """
        if not self._checkpoints.directory:
            raise CheckpointUnwritable(
                "this cluster has no directory of checkpoints",
                remedy="Start it with --checkpoint-dir.",
            )
        self._of(job).ask()

    def tick(self, entry: Entry, *, opened: bool, version: int, now: float) -> list[Instruction]:
        """See `Cutting.tick`."""
        if not self._checkpoints.directory:
            return []
        return self._of(entry.job).tick(entry, opened=opened, version=version, now=now)

    def logged(self, worker: str, logged: Logged) -> None:
        """See `Cutting.logged`."""
        self._of(logged.job).logged(worker, logged)

    def snapshotted(self, shard: str, answer: Snapshotted) -> list[Instruction]:
        """See `Cutting.snapshotted`."""
        return self._of(answer.job).snapshotted(shard, answer)

    def stored(self, commit: Commit, error: AdashardError | None) -> list[Instruction]:
        """See `Cutting.stored`."""
        return self._of(commit.checkpoint.job).stored(commit.checkpoint, error)

    def _of(self, job: str) -> Cutting:
        if job not in self._jobs:
            self._jobs[job] = Cutting(self._checkpoints, self._author)
        return self._jobs[job]


def _placed(entry: Entry) -> dict[str, set[int]]:
    """By shard, the slices placed on it; shards without any are not there."""
    placed: dict[str, set[int]] = {}
    for index, owner in enumerate(entry.placement):
        placed.setdefault(entry.shards[owner].id, set()).add(index)
    return placed


def _wrong(one: _Cut) -> AdashardError | None:
    """What keeps the shards' answers from being one checkpoint."""
    for shard, slices in _placed(one.entry).items():
        if set(one.parts[shard].slices) != slices:
            return Internal(f"shard {shard} has not cut the slices that are placed on it")
    if len({part.record for part in one.parts.values()}) > 1:
        return Internal(f"two shards have different records of step {one.version}")
    return None


def _not_finite(one: _Cut) -> tuple[str, ...]:
    """Names of the parameters of which some slice is not finite."""
    slices, spec = cut(one.entry.spec), one.entry.spec
    indices = {index for part in one.parts.values() for index in part.not_finite}
    parameters = sorted({slices[index].parameter for index in indices})
    return tuple(spec.parameters[parameter].name for parameter in parameters)


def _completed(one: _Cut) -> Announce:
    stall_s = max(part.stall_s for part in one.parts.values())
    byte_count = sum(file.byte_count for part in one.parts.values() for file in part.files)
    text = f"checkpoint {one.name}: {byte_count / 1e6:.1f} MB; steps waited {1e3 * stall_s:.1f} ms"
    facts = {
        "checkpoint": one.name,
        "version": str(one.version),
        "bytes": str(byte_count),
        "stall_s": f"{stall_s:.6f}",
        KEPT: str(one.kept),
    }
    return Announce(one.entry.job, COMPLETED, text, facts)
