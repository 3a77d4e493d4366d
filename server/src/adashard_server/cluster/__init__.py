"""Who is there, and who holds what.

Decisions are pure: events and a clock in, instructions out. May import `adashard.wire`; no
network, no tensors, and of the server's rooms none.
"""
