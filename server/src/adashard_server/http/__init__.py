"""REST and the page: what people and Prometheus see of a coordinator. Only reads, so far.

May import `cluster.statistics`, `telemetry` and `adashard.wire`; knows the coordinator as a view.
"""
