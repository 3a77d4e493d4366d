"""What a shard alone has seen, and people should know of. Pure."""

from __future__ import annotations

from adashard.wire.control import CHECKPOINT_UNREADABLE, Happened
from adashard.wire.errors import CheckpointUnreadable
from adashard.wire.messages import Entry
from adashard.wire.placement import cut
from adashard_server.shard.instructions import Degraded

_NAMED_MAX = 5


def unreadable(entry: Entry, error: CheckpointUnreadable) -> Happened:
    """The checkpoint of a lineage cannot be read here."""
    assert entry.lineage is not None
    facts = {"checkpoint": entry.lineage.checkpoint, **error.facts}
    return Happened(job=entry.job, name=CHECKPOINT_UNREADABLE, text=error.message, facts=facts)


def degraded(entry: Entry, shard: str, what: Degraded) -> Happened:
    """A decided step is finished in some slices without workers that died in it with a shard.

    Args:
        entry: of the generation.
        shard: this one's id.
        what: as the rounds have it.
    """
    pieces = cut(entry.spec)
    names = sorted({entry.spec.parameters[pieces[n].parameter].name for n in what.slices})
    some = ", ".join(map(repr, names[:_NAMED_MAX])) + (", ..." if len(names) > _NAMED_MAX else "")
    gone = ", ".join(what.gone)
    return Happened(
        job=entry.job,
        name="degraded",
        text=f"step {what.step} of {some} is finished without {gone}: gone, with a shard, in it",
        facts={
            "shard": shard,
            "step": str(what.step),
            "workers": gone,
            "slices": ",".join(map(str, what.slices)),
        },
    )
