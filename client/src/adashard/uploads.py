"""Sends to shards what a plan names this worker source of (rule W3)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from adashard import failpoints
from adashard.copies import Copies
from adashard.transport.base import Transport
from adashard.transport.links import Links
from adashard.wire.control import Happened
from adashard.wire.errors import AdashardError, ShardUnavailable
from adashard.wire.frames import leading_frame
from adashard.wire.messages import Entry, Member, Plan, UploadBegin

log = logging.getLogger("adashard")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """Slices that go to one shard in one stream, as all have one version, and state or none."""

    member: Member
    version: int
    state: bool
    slices: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Progress:
    """How far the uploads of one generation are."""

    generation: int
    acknowledged: set[int] = field(default_factory=set)
    busy: bool = False
    told: bool = False  # of rounded copies


class Uploads:
    """One worker's uploads, for one plan at a time.

    `begin` belongs to the thread that gets plans, `send` to any; one that hangs on a shard that is
    gone does not keep the next generation's from beginning.

    Args:
        transport: reaches the shards.
        job: its name.
        sender: the worker's id.
        tell: tells the coordinator what people should know.
        intact: whether the weights of a slice are still those of its copy; if not, it is none.
        missed: the plan counts on copies that are none.
        links: which shards answer.
    """

    def __init__(
        self,
        transport: Transport,
        job: str,
        sender: str,
        *,
        tell: Callable[[Happened], None],
        intact: Callable[[int], bool],
        missed: Callable[[Plan], None],
        links: Links,
    ) -> None:
        self._transport, self._job, self._sender, self._links = transport, job, sender, links
        self._tell, self._intact, self._missed = tell, intact, missed
        self._progress = _Progress(0)

    def begin(self, plan: Plan, wanted: Mapping[int, int]) -> dict[int, int]:
        """What of `wanted` is to be sent now; nothing while a plan's uploads are under way.

        Args:
            plan: the reason; it may come many times.
            wanted: the version of each slice.

        Returns:
            What `send` has to be called with, unless it is empty.
        """
        if plan.entry.generation != self._progress.generation:
            self._progress = _Progress(plan.entry.generation)
        progress = self._progress
        if progress.busy:
            return {}
        left = {one: wanted[one] for one in wanted if one not in progress.acknowledged}
        progress.busy = bool(left)
        return left

    def send(self, plan: Plan, wanted: Mapping[int, int], copies: Copies) -> None:
        """Uploads slices to their shards. What fails is sent again when the plan is repeated.

        Args:
            plan: the reason, for which `begin` has been called.
            wanted: the version of each slice.
            copies: has them.
        """
        progress = self._progress
        try:
            intact = {index: wanted[index] for index in wanted if self._intact(index)}
            if len(intact) < len(wanted):
                self._say_changed(sorted(wanted.keys() - intact.keys()), copies)
                self._missed(plan)
            if not progress.told:
                progress.told = self._say_rounded(plan, intact, copies)
            for parcel in _parcels(plan.entry, intact, copies):
                begin = UploadBegin(
                    job=self._job,
                    generation=plan.entry.generation,
                    sender=self._sender,
                    receiver=parcel.member.id,
                    version=parcel.version,
                    state=parcel.state,
                )
                self._upload(parcel.member, begin, copies.frames(parcel.slices))
                progress.acknowledged.update(parcel.slices)
        except AdashardError as error:
            log.debug("job %r: an upload failed, and is repeated when asked: %s", self._job, error)
        finally:
            progress.busy = False

    def _upload(self, member: Member, begin: UploadBegin, frames: Iterator[bytes]) -> None:
        """Sends one stream; the link counts as whole as long as frames are taken (C9)."""

        def stream() -> Iterator[bytes]:
            yield leading_frame(begin)
            for frame in frames:
                failpoints.reach("upload.frame")
                self._links.answered(member.id)
                self._links.asked(member.id, begin)
                yield frame

        self._links.asked(member.id, begin)
        try:
            self._transport.upload(member.address, stream())
        except AdashardError as error:
            if not isinstance(error, ShardUnavailable):
                self._links.answered(member.id)  # a refusal is an answer as good as any
            raise
        else:
            self._links.answered(member.id)
        finally:
            self._links.dropped(member.id)

    def _say_changed(self, indices: Sequence[int], copies: Copies) -> None:
        names = ", ".join(repr(name) for name in dict.fromkeys(map(copies.name, indices)))
        text = (
            f"{len(indices)} slices cannot be copied from worker {self._sender}: other weights "
            f"than the job's have been written into {names}"
        )
        log.warning("job %r: %s", self._job, text)
        facts = {"worker": self._sender, "slices": str(len(indices))}
        self._tell(Happened(job=self._job, name="changed", text=text, facts=facts))

    def _say_rounded(self, plan: Plan, indices: Iterable[int], copies: Copies) -> bool:
        """Tells of copies that bring back less than a shard has had, if there are any."""
        count = sum(not copies.exact(index) for index in indices)
        if not count:
            return False
        text = (
            f"{count} slices go on from weights that were rounded on their way to worker "
            f"{self._sender}; keep_masters=True keeps exact ones"
        )
        facts = {"worker": self._sender, "slices": str(count)}
        facts["generation"] = str(plan.entry.generation)
        self._tell(Happened(job=self._job, name="rounded", text=text, facts=facts))
        return True


def _parcels(entry: Entry, wanted: Mapping[int, int], copies: Copies) -> list[Parcel]:
    found: dict[tuple[int, int, bool], Parcel] = {}
    for index, version in wanted.items():
        key = entry.placement[index], version, copies.stepped(index)
        parcel = Parcel(member=entry.shards[key[0]], version=version, state=key[2])
        found.setdefault(key, parcel).slices.append(index)
    return list(found.values())
