"""The allocator of a shard's process takes its settings, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_glibc_takes_every_setting() -> None:
    program = "from adashard_server.app.allocator import keep_freed_memory as keep; print(keep())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True"]
