"""Sends to shards what a plan names this worker source of (rule W3)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from adashard.transport.base import Transport
from adashard.wire.errors import AdashardError
from adashard.wire.frames import leading_frame
from adashard.wire.messages import Member, Plan, UploadBegin

log = logging.getLogger("adashard")


class Uploads:
    """One worker's uploads, one plan at a time; in whichever thread calls.

    Args:
        transport: reaches the shards.
        job: its name.
        sender: the worker's id.
    """

    def __init__(self, transport: Transport, job: str, sender: str) -> None:
        self._transport, self._job, self._sender = transport, job, sender
        self.busy = False
        """Whether one is under way. What is asked for meanwhile is asked for again."""

    def send(
        self,
        plan: Plan,
        slices: Mapping[Member, Sequence[int]],
        frames: Callable[[Sequence[int]], Iterator[bytes]],
        *,
        state: bool,
    ) -> None:
        """Uploads slices to their shards. What fails is sent again when the plan is repeated.

        Args:
            plan: the reason.
            slices: by shard.
            frames: makes those that carry slices whole.
            state: whether these carry optimizer state too.
        """
        try:
            for member, indices in slices.items():
                begin = UploadBegin(
                    job=self._job,
                    generation=plan.entry.generation,
                    sender=self._sender,
                    receiver=member.id,
                    version=plan.base,
                    state=state,
                )
                self._transport.upload(member.address, _stream(begin, frames(indices)))
        except AdashardError as error:
            log.debug("job %r: an upload failed, and is repeated when asked: %s", self._job, error)
        finally:
            self.busy = False


def _stream(begin: UploadBegin, frames: Iterator[bytes]) -> Iterator[bytes]:
    yield leading_frame(begin)
    yield from frames
