"""The server's side of adashard: shards, the coordinator, REST and its page.

Depends on the distribution `adashard` of the same version, and of that on `adashard.wire` and
the transport only. Public: `LocalCluster`.
"""
