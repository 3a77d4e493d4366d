"""Files of others are what they say they are, and have their licence beside them."""

import hashlib
import json
from pathlib import Path

import pytest

from adashard_server.http.routes.site import DASHBOARD

FOLDERS = sorted((DASHBOARD / "vendor").iterdir())


def manifest(folder):
    return json.loads((folder / "vendor.json").read_text())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_file_has_the_hash_that_was_written_down(folder):
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "vendor.json"
    }
    assert found == manifest(folder)["sha256"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_package_names_its_version_and_brings_its_licence(folder):
    said = manifest(folder)
    assert folder.name == f"{said['name']}-{said['version']}"
    assert said["licence"] in ("MIT", "Apache-2.0")
    assert "LICENSE" in said["sha256"]


def test_the_tool_and_the_folders_speak_of_the_same_packages():
    tool = (Path(__file__).parents[2] / "tools/vendor.py").read_text()
    for folder in FOLDERS:
        assert f'"{manifest(folder)["name"]}"' in tool
        assert f'"{manifest(folder)["version"]}"' in tool


def test_the_pages_use_every_package_in_the_version_that_is_there():
    pages = "".join((DASHBOARD / name).read_text() for name in ("index.html", "docs.html"))
    for folder in FOLDERS:
        assert f"static/vendor/{folder.name}/" in pages
