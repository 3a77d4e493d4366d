"""What one node holds and does: slices, the rounds over them, and the exchange with its peers.

No gRPC, no Redis, no wall clock: edges call in, a clock is passed in. May import
`adashard.wire` and `adashard_server.optim`.
"""
