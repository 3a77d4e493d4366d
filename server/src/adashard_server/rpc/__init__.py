"""The gRPC edge: thin handlers that check, call the core, and translate errors.

The coordinator's service is asynchronous, since it holds thousands of quiet streams; the shard's
runs a thread a stream, since the work of a step is done in the thread that needs it (see
`shard/engine.py`). May import `shard`, `cluster`, `telemetry` and `adashard`'s wire and transport.
"""
