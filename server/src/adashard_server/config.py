"""Settings of the processes, in one place: names, units, defaults. The CLI reads them."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field

from adashard.wire.errors import InvalidSettings
from adashard.wire.placement import DEFAULT_SLICE_BYTES
from adashard_server.cluster.checkpoints import CheckpointSettings
from adashard_server.cluster.leases import LeaseSettings
from adashard_server.cluster.strikes import STRIKES

GRPC_PORT = 50051
HTTP_PORT = 8080
DRAIN_S = 10.0
MEMORY = "memory"
LATEST = "latest"
_ANY_HOST = ("0.0.0.0", "[::]", "::", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    """A coordinator process.

    Attributes:
        bind: address to listen on, for gRPC and HTTP.
        advertise: host that members reach it at; None for `bind`, or the host's name.
        port: of the control plane; 0 for a free one.
        http_port: of REST and the page; 0 for a free one.
        registry: "memory", or the URL of a Redis server.
        min_shards: shards that a job's first step needs.
        slice_bytes: of jobs whose workers leave it open.
        strikes: steps in a row with gradients that are not finite, after which a worker is evicted;
            0 for never.
        max_update_rms: RMS of an update, before clipping, above which a step is told of; 0 for
            what is unusual only.
        token: the cluster's secret; empty for none.
        leases: times of membership.
        checkpoint_dir: directory of checkpoints, on a file system that all shards share; empty
            for none.
        checkpoints: when they are cut, and which are kept.
        resume: "latest" for jobs to begin from their newest checkpoint, or the folder of one.
    """

    bind: str = "127.0.0.1"
    advertise: str | None = None
    port: int = GRPC_PORT
    http_port: int = HTTP_PORT
    registry: str = MEMORY
    min_shards: int = 1
    slice_bytes: int = DEFAULT_SLICE_BYTES
    strikes: int = STRIKES
    max_update_rms: float = 0.0
    token: str = field(default="", repr=False)
    leases: LeaseSettings = LeaseSettings()
    checkpoint_dir: str = ""
    checkpoints: CheckpointSettings = CheckpointSettings()
    resume: str = ""

    @property
    def host(self) -> str:
        """The host that others reach this process at."""
        return _advertised(self.bind, self.advertise)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSettings:
    """A shard process.

    Attributes:
        coordinator: host:port of the coordinator.
        bind: address to listen on.
        advertise: host that workers and shards reach it at; None for `bind`, or the host's name.
        port: of the data plane; 0 for a free one.
        device: "auto", "cpu" or "cuda:N".
        token: the cluster's secret; empty for none.
        drain_s: how long a round under way may take when the process is asked to end.
        checkpoint_dir: where this machine has the cluster's directory of checkpoints; empty for
            where the coordinator says.
    """

    coordinator: str = f"127.0.0.1:{GRPC_PORT}"
    bind: str = "127.0.0.1"
    advertise: str | None = None
    port: int = 0
    device: str = "auto"
    token: str = field(default="", repr=False)
    drain_s: float = DRAIN_S
    checkpoint_dir: str = ""

    @property
    def host(self) -> str:
        """The host that others reach this process at."""
        return _advertised(self.bind, self.advertise)


def _advertised(bind: str, advertise: str | None) -> str:
    if advertise:
        return advertise
    return platform.node() if bind in _ANY_HOST else bind


def check_device(device: str) -> str:
    """The torch device for `device`; "auto" is the first GPU if there is one.

    Raises:
        InvalidSettings: there is no such device.
    """
    import torch  # a coordinator, and `--help`, start without it

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidSettings(
            f"--device {device!r} cannot be used: {str(error).splitlines()[0]}",
            remedy="Choose auto, cpu or cuda:N.",
        ) from None
    return device
