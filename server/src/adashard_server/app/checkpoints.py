"""A coordinator's directory of checkpoints: what is in it at the start, and what is done there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from adashard.wire.errors import (
    AdashardError,
    CheckpointUnwritable,
    InvalidSettings,
    StepTimedOut,
    from_info,
)
from adashard.wire.messages import ErrorInfo
from adashard.wire.version import VERSION
from adashard_server.cluster.checkpoints import Checkpoint, Checkpoints
from adashard_server.cluster.cutting import COMPLETED, FAILED, KEPT, LOSS, Cuttings
from adashard_server.cluster.instructions import Announce, Commit, Discard, Keep, Remove
from adashard_server.config import LATEST, CoordinatorSettings
from adashard_server.storage import checkpoints as storage
from adashard_server.storage.manifest import FORMAT, Manifest, read_manifest

log = logging.getLogger("adashard.checkpoints")

ASKED_S_MAX = 600.0


class CheckpointKeeper:
    """Carries out what is decided about checkpoints.

    Args:
        settings: where they are, and what is resumed.

    Raises:
        CheckpointUnreadable: the directory, or the checkpoint to resume from, cannot be read.
        CheckpointUnwritable: the directory cannot be written to.
        InvalidSettings: something is to be resumed from nowhere, or from another directory.
    """

    def __init__(self, settings: CoordinatorSettings) -> None:
        directory, resume = _resumed(settings)
        self._directory = storage.CheckpointDirectory(directory) if directory else None
        self.checkpoints = Checkpoints(settings.checkpoints)
        self._asked = defaultdict[str, list[asyncio.Future[Mapping[str, str]]]](list)
        if self._directory is not None:
            self._directory.claim()
            self.checkpoints = _known(self._directory, settings, resume)

    def close(self) -> None:
        """Lets go of the directory."""
        if self._directory is not None:
            self._directory.release()

    def carry_out(self, keep: Keep) -> None:
        """Does what is decided; takes as long as the disk does. Thread-safe.

        Raises:
            CheckpointUnwritable: the disk refuses.
            CheckpointUnreadable: a shard has written its files elsewhere.
        """
        if self._directory is None:
            raise CheckpointUnwritable("this cluster has no directory of checkpoints")
        match keep:
            case Commit(attempt=attempt):
                self._directory.commit(_manifest(keep, time.time()), attempt)
            case Discard(job=job, attempt=attempt):
                storage.discard(self._directory.path, job, attempt)
            case Remove(job=job, name=name):
                self._directory.remove(job, name)

    # --- for people -----------------------------------------------------------------------------

    async def create(self, cuttings: Cuttings, job: str) -> Mapping[str, str]:
        """Has a checkpoint made of a job as it is now; the facts of the event that tells of it.

        Raises:
            CheckpointUnwritable: there is no directory, or the disk refuses.
            StepTimedOut: it has not come about in time.
        """
        cuttings.ask(job)
        asked: asyncio.Future[Mapping[str, str]] = asyncio.get_running_loop().create_future()
        self._asked[job].append(asked)
        try:
            async with asyncio.timeout(ASKED_S_MAX):
                return await asked
        except TimeoutError:
            raise StepTimedOut(
                f"the checkpoint of job {job!r} is not there after {ASKED_S_MAX:.0f} s",
                remedy="It is made when the job's generation is open; the log says what it waits "
                "for, and `adashard checkpoint list` whether it has come.",
            ) from None
        finally:
            self._asked[job].remove(asked)

    def announced(self, event: Announce) -> None:
        """An event; whoever has asked for the checkpoint that it tells of is answered."""
        if event.name not in (COMPLETED, FAILED) or event.facts[KEPT] != str(True):
            return
        for asked in self._asked[event.job]:
            if asked.done():
                continue
            if event.name == COMPLETED:
                asked.set_result(event.facts)
            else:
                asked.set_exception(_failure(event))


def _failure(event: Announce) -> AdashardError:
    facts = {name: fact for name, fact in event.facts.items() if name != "remedy"}
    remedy = event.facts.get("remedy", "")
    return from_info(
        ErrorInfo(reason=facts["reason"], message=event.text, remedy=remedy, metadata=facts)
    )


# --- what is there at the start ------------------------------------------------------------------


def _resumed(settings: CoordinatorSettings) -> tuple[Path | None, dict[str, str]]:
    """The directory, and by job the checkpoint that it begins with; see `Checkpoints`."""
    directory = Path(settings.checkpoint_dir).absolute() if settings.checkpoint_dir else None
    if not settings.resume:
        return directory, {}
    if settings.resume == LATEST:
        if directory is None:
            raise InvalidSettings("--resume latest needs --checkpoint-dir")
        return directory, {"": ""}
    folder = Path(settings.resume).absolute()
    manifest = read_manifest(folder)
    root = directory or folder.parents[1]
    place = storage.checkpoint_folder(root, manifest.job, manifest.name)
    if folder.resolve() != place.resolve():
        raise InvalidSettings(
            f"--resume {folder} is not in the directory of checkpoints: its place is {place}",
            remedy="Move it there, or name the directory that it is in with --checkpoint-dir.",
        )
    return root, {manifest.job: manifest.name}


def _known(
    directory: storage.CheckpointDirectory,
    settings: CoordinatorSettings,
    resume: Mapping[str, str],
) -> Checkpoints:
    """What is in the directory; of what is damaged, the log tells."""
    known, taken = list[Checkpoint](), list[str]()
    for found in storage.checkpoints(directory.path):
        if isinstance(found, Manifest):
            known.append(_checkpoint(found))
        else:
            log.warning("a checkpoint is passed over: %s", found.error.message)
            taken.append(found.path.name)
    if resume and not known:
        log.warning("there is no checkpoint in %s: jobs begin anew", directory.path)
    return Checkpoints(
        settings.checkpoints,
        known,
        taken=taken,
        resume=resume,
        directory=str(directory.path),
        mark=directory.mark,
    )


def _checkpoint(manifest: Manifest) -> Checkpoint:
    return Checkpoint(
        job=manifest.job,
        name=manifest.name,
        version=manifest.version,
        generation=manifest.generation,
        lineage=manifest.lineage,
        spec=manifest.spec,
        record=manifest.record,
        loss=manifest.values.get(LOSS),
        finite=not manifest.not_finite,
        kept=manifest.kept,
    )


def _manifest(commit: Commit, now_s: float) -> Manifest:
    checkpoint = commit.checkpoint
    return Manifest(
        format=FORMAT,
        adashard=VERSION,
        job=checkpoint.job,
        name=checkpoint.name,
        version=checkpoint.version,
        generation=checkpoint.generation,
        lineage=checkpoint.lineage,
        spec=checkpoint.spec,
        placement=commit.placement,
        files=commit.files,
        record=checkpoint.record,
        values=commit.values,
        not_finite=commit.not_finite,
        kept=checkpoint.kept,
        written_at_s=now_s,
    )
