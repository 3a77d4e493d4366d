"""What a measurement was made on, when and by which command: beside the numbers in every file."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

CPU_INFORMATION = Path("/proc/cpuinfo")


def provenance(script: str) -> dict[str, object]:
    """Command, date (UTC) and machine; no host names, so that files may be published.

    Args:
        script: path of the running benchmark from the root of the repository.
    """
    return {
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "cpu": cpu_model(),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def cpu_model() -> str:
    """The processor's name as Linux tells it."""
    for line in CPU_INFORMATION.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def slug(machine: dict[str, object]) -> str:
    """A machine, as `provenance` tells it, in letters, digits and hyphens: for names of files."""
    text = f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
