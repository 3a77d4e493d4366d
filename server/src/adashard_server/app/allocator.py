"""How a shard's process keeps the memory that frames come and go in."""

from __future__ import annotations

import ctypes
import logging
import platform

log = logging.getLogger("adashard.allocator")

# Options of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8

_SETTINGS = {
    _M_ARENA_MAX: 1,  # else each thread's arena keeps its own frames
    _M_MMAP_THRESHOLD: 4 << 20,  # frames from the heap; slices of the default size and more apart
    _M_TRIM_THRESHOLD: 64 << 20,
    _M_TOP_PAD: 16 << 20,
}


def keep_freed_memory() -> bool:
    """Has glibc hold on to what is freed, so that the next frame finds pages that are there.

    By default it gives memory of a megabyte back to the kernel at once, and gets it anew, page by
    page and full of zeros, for the next frame. It is for a process of our own, before its threads
    start; it changes nothing where the C library is another.

    Returns:
        Whether all was accepted.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    refused = [option for option, value in _SETTINGS.items() if not library.mallopt(option, value)]
    if refused:
        log.warning("glibc refuses %s of its allocator's settings: frames are slower", refused)
    return not refused
