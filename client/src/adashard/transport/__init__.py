"""How bytes and control messages reach the other processes.

`base` is the protocol, `grpc` carries it, `attendance` keeps a member's control stream open.
May import `adashard.wire` and `adashard.retry`; used by the session and, as the only other thing
of the client, by the server's processes.
"""
