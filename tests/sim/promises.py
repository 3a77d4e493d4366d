"""What must hold, whatever goes wrong (docs/protocol.md): looked at after every event."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.sim.history import Violation

from adashard.wire.control import Bye
from adashard.wire.errors import AdashardError, JobLost, LeaseExpired
from adashard.wire.messages import Entry, Member
from adashard_server.shard.instructions import Degraded
from adashard_server.shard.rounds import Rounds

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.worker import SimWorker


class Promises:
    """Remembers what must not change, and compares. Every method raises `Violation`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._orders: dict[int, tuple[str, ...]] = {}
        self._ranks: dict[str, int] = {}
        self._took_part: set[str] = set()  # workers that were in an open generation
        self._lineage = 0  # the one that was opened last

    # --- the registry ---------------------------------------------------------------------------

    def wrote(self, entry: Entry) -> None:
        """A generation is written: ranks ascend (G2), and weights are not begun anew (C5)."""
        for worker in entry.workers:
            if self._ranks.get(worker.id) != worker.rank:
                self._check_rank(worker)
                self._ranks[worker.id] = worker.rank
        lineage = entry.lineage
        if lineage and self._lineage not in (0, lineage.number) and not lineage.checkpoint:
            raise Violation(f"the job goes on from the initial weights of {lineage.origin}")

    def _check_rank(self, worker: Member) -> None:
        """A worker that was left out before it had a part in any step is as good as a new one."""
        if worker.id in self._took_part:
            raise Violation(f"rank of {worker.id} changes to {worker.rank}")
        taken = (self._ranks[one] for one in self._took_part)
        if worker.rank <= max(taken, default=-1):
            raise Violation(f"rank {worker.rank} of {worker.id} is not above all others")

    def forgotten(self) -> None:
        """A job begins anew only where none of its members is left that could tell of it (G1)."""
        cluster = self._cluster
        if not cluster.kind.parts:
            left = [
                one.name
                for one in cluster.members()
                if one.entry is not None and one.entry.opened and cluster.is_member(one.name)
            ]
            if left:
                raise Violation(f"the job begins anew though {left} know of it")

    def opened(self, entry: Entry) -> None:
        """A generation is open."""
        self._took_part.update(worker.id for worker in entry.workers)
        self._lineage = entry.lineage.number if entry.lineage else 0

    # --- members --------------------------------------------------------------------------------

    def sums(self, rounds: Rounds) -> None:
        """All shards of a generation sum the same workers."""
        order = self._orders.setdefault(rounds.promised, rounds.order)
        if order != rounds.order:
            raise Violation(f"{rounds.shard} sums {rounds.order} in a generation of {order}")

    def told(self, entry: Entry, member: str, message: object) -> None:
        """A leaver goes only when nobody who stays has less than it (C8)."""
        if not isinstance(message, Bye) or message.error is not None:
            return
        held = {one.name: one.worker.version for one in self._cluster.live_workers()}
        if member not in held or not self._cluster.is_member(member):
            return
        self._cluster.saw("a leaver is let go")
        for other in entry.workers:
            stays = other.id != member and not other.leaving
            if stays and held.get(other.id, held[member]) < held[member]:
                raise Violation(f"{member} is let go before {other.id} has its version")

    def took(self, worker: SimWorker) -> None:
        """A worker that has taken a step holds one version of one lineage, and its record."""
        version, record = worker.worker.version, worker.worker.record
        lines = {weights.line for weights in worker.values if weights is not None}
        if len(lines) != 1 or None in worker.values or lines.pop().version != version:
            raise Violation(f"{worker.name} took step {version} and holds {worker.values}")
        if version > 0 and (record is None or record.step != version):
            raise Violation(f"{worker.name} at {version} has the record {record}")

    def ended(self, worker: SimWorker, error: AdashardError) -> None:
        """A worker is refused only where it was silent for too long, or the job is lost."""
        left_out = isinstance(error, LeaseExpired)
        lost = isinstance(error, JobLost) and self._cluster.lost
        if not lost and (self._cluster.kind.keeps or not left_out):
            raise Violation(f"{worker.name} is refused, without fault of its own: {error}")

    # --- copies ---------------------------------------------------------------------------------

    def copies(self) -> None:
        """All that living members hold is of one history."""
        cluster, entry = self._cluster, self._cluster.registry.newest
        if entry is None or entry.lineage is None:
            return
        names = {one.id for one in (*entry.workers, *entry.shards)}
        held = {one.name: one.copies() for one in cluster.members() if one.name in names}
        cluster.truth.agree(entry.lineage.number, held)

    def degraded(self, told: Degraded) -> None:
        """A decided step is finished without a worker only where that has gone."""
        if self._cluster.kind.keeps:
            raise Violation(f"step {told.step} is degraded though no worker died")
        for worker in told.gone:
            if self._cluster.is_member(worker):
                raise Violation(f"{worker} is called gone, and is not")

    def lost(self, text: str, *, wholly: bool) -> None:
        """State is lost only if every holder of some slice is gone, and `wholly` without copies."""
        cluster, entry = self._cluster, self._cluster.registry.newest
        assert entry is not None
        assert entry.lineage is not None
        if cluster.kind.keeps:
            raise Violation(f"state is lost though nothing that it needs was killed: {text}")
        newest = dict.fromkeys(range(len(cluster.truth.slices)), -1)
        for one in cluster.members():
            for index, weights in one.copies().items():
                if weights.line.lineage == entry.lineage.number and cluster.is_member(one.name):
                    newest[index] = max(newest[index], weights.version)
        if min(newest.values()) >= max(0, max(newest.values()) - 1):
            raise Violation(f"state is lost though members hold all of it: {text}")
        if wholly and cluster.disk.count:
            raise Violation(f"the job is lost though there are checkpoints: {text}")

    def rest(self) -> None:
        """When everybody rests, all hold the same."""
        resting = [one for one in self._cluster.live_workers() if self._cluster.resting(one)]
        for worker in resting:
            self.took(worker)
        lines = {weights.line for one in resting for weights in one.values if weights is not None}
        if len(lines) > 1:
            raise Violation(f"workers rest at {lines}")
