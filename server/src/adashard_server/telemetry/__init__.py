"""What is measured, for people and for Prometheus.

May import `adashard.wire` and nothing else of ours.
"""
