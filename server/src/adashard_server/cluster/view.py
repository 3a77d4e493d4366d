"""What the coordinator tells people about itself, put together when asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from adashard.wire.placement import cut
from adashard.wire.spec import Recovery
from adashard.wire.version import VERSION
from adashard_server.cluster.coordinator import Contact, Coordinator
from adashard_server.cluster.membership import Membership, Phase
from adashard_server.cluster.statistics import (
    ClusterStatistics,
    Event,
    JobStatistics,
    JobStatus,
    MemberStatus,
    ShardStatistics,
    WorkerStatistics,
)

EVENTS_MAX = 1000
_ADAM_BYTES = 8  # two float32 moments an element


class CoordinatorView:
    """A `ClusterView` of a coordinator; to be called in its thread.

    Args:
        coordinator: read, never changed.
        registry: the registry's name.
        address: host:port where members reach the coordinator.
        clock: the coordinator's, in seconds.
    """

    def __init__(
        self, coordinator: Coordinator, registry: str, address: str, clock: Callable[[], float]
    ) -> None:
        self._coordinator = coordinator
        self._registry, self._address = registry, address
        self._clock, self._began = clock, clock()
        self._events: deque[Event] = deque(maxlen=EVENTS_MAX)

    def remember(self, event: Event) -> None:
        """An event has been announced."""
        self._events.append(event)

    def cluster_statistics(self) -> ClusterStatistics:
        """The cluster at a glance."""
        shards = [shard for shard in self.shard_statistics() if shard.status == "live"]
        workers = self.worker_statistics()
        missing = self._coordinator.min_shards - len(shards)
        not_ready = [f"{missing} more shards are needed"] if missing > 0 else []
        if self._coordinator.registry_error:
            not_ready.append(self._coordinator.registry_error)
        return ClusterStatistics(
            version=VERSION,
            address=self._address,
            registry=self._registry,
            uptime_s=self._clock() - self._began,
            shard_count=len(shards),
            min_shards=self._coordinator.min_shards,
            worker_count=len(workers),
            job_count=len(self._coordinator.jobs),
            not_ready=tuple(not_ready),
        )

    def shard_statistics(self) -> list[ShardStatistics]:
        """All shards, by index."""
        found = [
            self._shard(member, contact)
            for member, contact in self._coordinator.contacts.items()
            if contact.job is None
        ]
        return sorted(found, key=lambda shard: shard.index)

    def worker_statistics(self, job: str | None = None) -> list[WorkerStatistics]:
        """Workers of one job or of all, by job and rank."""
        found = [
            self._worker(member, contact, membership)
            for member, contact in self._coordinator.contacts.items()
            if contact.job is not None and job in (None, contact.job)
            if (membership := self._coordinator.jobs.get(contact.job)) is not None
            if member in membership.worker_ids()
        ]
        return sorted(found, key=lambda one: (one.job, one.rank is None, one.rank or 0, one.id))

    def job_statistics(self) -> list[JobStatistics]:
        """All jobs, by name."""
        return [self._job(name, one) for name, one in sorted(self._coordinator.jobs.items())]

    def holder_count(self, job: str) -> int:
        """How many shards hold slices of a job; 0 for one that is not there."""
        membership = self._coordinator.jobs.get(job)
        return len(set(membership.entry.placement)) if membership else 0

    def events(self, after: int = 0, job: str | None = None) -> list[Event]:
        """Events with a sequence number above `after`, oldest first."""
        return [
            event for event in self._events if event.sequence > after and job in (None, event.job)
        ]

    def _shard(self, member: str, contact: Contact) -> ShardStatistics:
        assert contact.hello.shard is not None
        holdings = contact.holdings.values()
        state: dict[str, int] = {}
        for holding in holdings:
            for kind, count in holding.state_bytes.items():
                state[kind] = state.get(kind, 0) + count
        return ShardStatistics(
            id=member,
            index=contact.index,
            address=contact.hello.shard.address,
            host=contact.hello.host,
            pid=contact.hello.pid,
            device=contact.hello.shard.device,
            status=self._status(member, contact, "draining" if contact.draining else "live"),
            renewed_s_ago=self._coordinator.leases.silent_s(member, self._clock()),
            versions={
                name: job.versions[member]
                for name, job in self._coordinator.jobs.items()
                if member in job.versions
            },
            weight_bytes=sum(holding.weight_bytes for holding in holdings),
            state_bytes=state,
            refused_report_count=sum(holding.refused_report_count for holding in holdings),
        )

    def _worker(self, member: str, contact: Contact, job: Membership) -> WorkerStatistics:
        ranks = {worker.id: worker for worker in job.entry.workers}
        listed = ranks.get(member)
        status: MemberStatus = "joining" if listed is None else "live"
        if listed is not None and listed.leaving:
            status = "leaving"
        return WorkerStatistics(
            id=member,
            job=job.entry.job,
            rank=listed.rank if listed else None,
            host=contact.hello.host,
            pid=contact.hello.pid,
            version=job.versions.get(member, -1),
            status=self._status(member, contact, status),
            renewed_s_ago=self._coordinator.leases.silent_s(member, self._clock()),
        )

    def _status(self, member: str, contact: Contact, status: MemberStatus) -> MemberStatus:
        dead = member in self._coordinator.leases.dead(self._clock())
        return "silent" if dead or not contact.attached else status

    def _job(self, name: str, job: Membership) -> JobStatistics:
        spec, status = job.entry.spec, _job_status(job)
        state, by_shard, weights = self._held(name)
        slices = cut(spec)
        elements = sum(piece.element_count for piece in slices)
        return JobStatistics(
            name=name,
            status=status,
            status_reason=job.reason if status in ("lost", "waiting") else "",
            generation=job.entry.generation,
            version=job.version,
            algorithm="adafactor",
            worker_count=len(job.worker_ids()),
            min_workers=spec.min_workers,
            shard_count=len(set(job.entry.placement)),
            parameter_count=len(spec.parameters),
            element_count=elements,
            slice_count=len(slices),
            slice_bytes=spec.slice_bytes,
            recovery="workers" if spec.recovery is Recovery.WORKERS else "checkpoint",
            weight_bytes=weights,
            state_bytes=state,
            state_bytes_by_shard=by_shard,
            adam_bytes=_ADAM_BYTES * elements,
        )

    def _held(self, job: str) -> tuple[dict[str, int], dict[str, int], int]:
        """State bytes by kind and by shard, and weight bytes, as the shards told last."""
        state: dict[str, int] = {}
        by_shard: dict[str, int] = {}
        weights = 0
        dead = self._coordinator.leases.dead(self._clock())
        for member, contact in self._coordinator.contacts.items():
            holding = contact.holdings.get(job)
            if holding is None or member in dead:
                continue
            weights += holding.weight_bytes
            by_shard[member] = sum(holding.state_bytes.values())
            for kind, count in holding.state_bytes.items():
                state[kind] = state.get(kind, 0) + count
        return state, by_shard, weights


def _job_status(job: Membership) -> JobStatus:
    if job.phase is Phase.LOST:
        return "lost"
    if job.phase is Phase.IDLE:
        return "waiting"
    if job.phase is not Phase.OPEN:
        return "changing"
    return "running" if job.worker_ids() else "waiting"
