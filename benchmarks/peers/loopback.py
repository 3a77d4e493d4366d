"""Gives this process a network of its own that has the loopback alone.

Ray takes the machine's own address even where 127.0.0.1 is asked for, so that the traffic of a
benchmark may leave by another interface. Where there is none, it cannot.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_REQUEST = "16sh14x"


def enter() -> str:
    """Moves this process, and all that it starts, there; call it before any thread is started.

    Returns:
        Nothing, or a sentence that says why it stays in the machine's network.
    """
    flags = _CLONE_NEWNET | (_CLONE_NEWUSER if os.geteuid() else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        reason = os.strerror(ctypes.get_errno())
        return f"It ran in the machine's own network: a namespace was refused ({reason})."
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        found = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack(_REQUEST, b"lo", 0))
        _, up = struct.unpack(_REQUEST, found)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack(_REQUEST, b"lo", up | _IFF_UP))
    return ""
