"""Two network namespaces with one link between them, as fast as it is told to be.

Linux only, as root: a veth pair, each end shaped on its way out by tc's token bucket. What runs in
a namespace sees its end of the link, and no other network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Self

_BURST_S = 0.001  # of traffic at the link's speed that passes at once
_LATENCY = "20ms"  # that a packet may wait for its turn; what would wait longer is dropped
_NEEDED = ("ip", "tc")


class NoNamespaces(Exception):
    """Namespaces or shaped links cannot be made here; the message says why."""


class ThinLink:
    """The two namespaces, from `with` to its end.

    Args:
        gbit_s: speed of the link, in each direction.
    """

    addresses = ("10.213.0.1", "10.213.0.2")

    def __init__(self, gbit_s: float) -> None:
        self._gbit_s = gbit_s
        self.names = tuple(f"adashard-{os.getpid()}-{end}" for end in "ab")

    def __enter__(self) -> Self:
        """Makes them.

        Raises:
            NoNamespaces: they cannot be made.
        """
        if os.name != "posix" or os.geteuid() != 0:
            raise NoNamespaces("network namespaces need root: run it with sudo")
        if missing := [name for name in _NEEDED if shutil.which(name) is None]:
            raise NoNamespaces(f"{' and '.join(missing)} not found: install iproute2")
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def inside(self, end: int, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` at an end of the link."""
        return ["ip", "netns", "exec", self.names[end], *command]

    def _make(self) -> None:
        devices = [f"ad{os.getpid()}{end}" for end in "ab"]
        for name in self.names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        for name, device, address in zip(self.names, devices, self.addresses, strict=True):
            _run("ip", "link", "set", device, "netns", name)
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", device)
            _run("ip", "-n", name, "link", "set", device, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            self._shape(name, device)

    def _shape(self, name: str, device: str) -> None:
        bits = self._gbit_s * 1e9
        bucket = ("rate", f"{bits:.0f}bit", "burst", f"{bits / 8 * _BURST_S:.0f}b")
        qdisc = ("qdisc", "add", "dev", device, "root", "tbf", *bucket, "latency", _LATENCY)
        _run("tc", "-n", name, *qdisc)

    def _remove(self) -> None:
        for name in self.names:  # the devices go with them
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise NoNamespaces(f"this machine does not allow `{' '.join(command)}`: {said}")
