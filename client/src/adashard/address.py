"""Addresses, host:port: that of the coordinator, as a script, its environment or nobody says it."""

from __future__ import annotations

import os

from adashard.wire.errors import InvalidSettings

DEFAULT_ADDRESS = "localhost:50051"


def coordinator_address(address: str | None) -> str:
    """host:port to connect to: the argument, else ADASHARD_ADDRESS, else this machine.

    Raises:
        InvalidSettings: it is none that could be connected to.
    """
    found = address or os.environ.get("ADASHARD_ADDRESS") or DEFAULT_ADDRESS
    host, _, port = found.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidSettings(f"address={found!r} is not host:port, e.g. {DEFAULT_ADDRESS}")
    if host in ("0.0.0.0", "[::]"):
        raise InvalidSettings(
            f"address={found!r}: {host} is where a server listens, not where it is reached",
            remedy="Use the server's host name, or localhost on the same machine.",
        )
    return found


def is_loopback(address: str) -> bool:
    """Whether host:port is reached without a network: nobody else's machine has such an address."""
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")
