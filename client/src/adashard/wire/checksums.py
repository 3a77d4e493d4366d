"""Checksums of what travels: CRC-32, as zlib has it, of the bytes of one content of a slice.

They guard copies: a link or a memory that turns a bit is noticed where the bytes arrive, and so is
a worker whose weights are not those that it was sent. Nobody is kept from forging one.
"""

from __future__ import annotations

from zlib_ng import zlib_ng

from adashard.wire.messages import Content, Run


def extended(checksum: int, data: memoryview) -> int:
    """The checksum of everything up to and with `data`; `checksum` is that of what was before."""
    return zlib_ng.crc32(data, checksum)


class RunningChecksums:
    """The checksums of one stream of runs. Not thread-safe.

    The runs of one content of a slice come in order; those of others may be between them. One that
    begins with element 0 begins anew.
    """

    def __init__(self) -> None:
        self._reached: dict[tuple[int, Content], int] = {}

    def after(self, run: Run, part: memoryview) -> int:
        """The checksum from element 0 of the run's content to the end of the run.

        Args:
            run: the next one.
            part: the bytes of its elements.
        """
        key = run.slice, run.content
        before = self._reached.get(key, 0) if run.start else 0
        reached = self._reached[key] = extended(before, part)
        return reached
