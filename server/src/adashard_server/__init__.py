"""The server's side of adashard: shards, the coordinator, REST and its page.

Depends on the distribution `adashard` of the same version, and of that on `adashard.wire` and
the transport only. Public: `LocalCluster`.
"""

from adashard.wire.version import VERSION as __version__
from adashard_server.cluster_local import LocalCluster

__all__ = ["LocalCluster", "__version__"]
