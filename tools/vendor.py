#!/usr/bin/env python3
"""Re-create the third-party files of the page: `tools/vendor.py`, or `--check` to compare hashes.

The page loads nothing from other hosts, so the few files it needs of others are kept in the
repository, each beside its licence and a `vendor.json` that says what it is. To update one, change
its version here, run this (it needs npm), and read the diff.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

VENDOR = Path(__file__).parent.parent / "server/src/adashard_server/http/dashboard/vendor"


@dataclass(frozen=True)
class Package:
    """An npm package, and the files of it that the page needs."""

    name: str
    version: str
    licence: str
    files: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where its files are kept; the version is part of the path, so browsers may cache them."""
        return VENDOR / f"{self.name}-{self.version}"


PACKAGES = (
    Package("uplot", "1.6.32", "MIT", ("dist/uPlot.iife.min.js", "dist/uPlot.min.css", "LICENSE")),
    Package(
        "swagger-ui-dist",
        "5.35.0",
        "Apache-2.0",
        (
            "swagger-ui-bundle.js",
            "swagger-ui-bundle.js.LICENSE.txt",
            "swagger-ui.css",
            "LICENSE",
            "NOTICE",
        ),
    ),
)


def fetch(package: Package) -> None:
    """Replace the package's folder by what the registry has of this version."""
    shutil.rmtree(package.folder, ignore_errors=True)
    package.folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as files:
            for path in package.files:
                source = files.extractfile(f"package/{path}")
                assert source is not None, f"{path} is not a file"
                (package.folder / Path(path).name).write_bytes(source.read())
    manifest = {
        "name": package.name,
        "version": package.version,
        "licence": package.licence,
        "sha256": hashes(package.folder),
    }
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (package.folder / "vendor.json").write_text(text)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file in a folder but its `vendor.json`."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "vendor.json"
    }


def differences() -> list[str]:
    """One line for each folder that is missing, unknown, or not what its `vendor.json` says."""
    expected = {package.folder.name for package in PACKAGES}
    found = {path.name for path in VENDOR.iterdir()}
    lines = [f"{name}: missing or unknown" for name in sorted(expected ^ found)]
    for name in sorted(expected & found):
        manifest = json.loads((VENDOR / name / "vendor.json").read_text())
        if hashes(VENDOR / name) != manifest["sha256"]:
            lines.append(f"{name}: files differ from vendor.json")
    return lines


def main() -> int:
    """Fetch all packages, or compare what is there."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare hashes; needs no network")
    if not parser.parse_args().check:
        for package in PACKAGES:
            fetch(package)
    lines = differences()
    print("\n".join(lines) or f"{len(PACKAGES)} packages are as vendor.json says")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
