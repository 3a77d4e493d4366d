"""A manifest comes back as it was written; a damaged one is refused and never a surprise."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.storage.stored import SPEC, filled, stored

from adashard.wire.errors import CheckpointUnreadable
from adashard_server.storage import manifest as manifests
from adashard_server.storage.manifest import NAME, read_manifest, to_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logged = {"values": {"loss": 2.5}, "not_finite": ("accuracy",)}
    return stored(tmp_path_factory.mktemp("manifest"), filled(SPEC), **logged)


def test_a_manifest_comes_back_as_it_was_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert (folder / NAME).read_text() == to_json(manifest)
    assert manifest.values == {"loss": 2.5}
    assert manifest.record is not None
    assert manifest.record.present == b"\x07"


def test_people_can_read_it_a_field_a_line(folder: Path) -> None:
    lines = (folder / NAME).read_text().splitlines()
    assert ' "version": 5,' in lines
    assert ' "job": "job",' in lines


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@given(data=st.data())
@settings(max_examples=200)
def test_whatever_stands_in_its_place_it_is_refused_or_read(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    other = tmp_path_factory.mktemp("other")
    content: Any = json.loads((folder / NAME).read_text())
    place = content
    while isinstance(place, dict | list) and len(place):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            place[key] = data.draw(JSON)
            break
        place = place[key]
    (other / NAME).write_text(json.dumps(content))
    with suppress(CheckpointUnreadable):  # and nothing else
        assert to_json(read_manifest(other))


@given(cut_at=st.integers(0, 400))
@settings(max_examples=20)
def test_a_manifest_cut_short_is_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, cut_at: int
) -> None:
    other = tmp_path_factory.mktemp("short")
    (other / NAME).write_bytes((folder / NAME).read_bytes()[:cut_at])
    with pytest.raises(CheckpointUnreadable, match="damaged"):
        read_manifest(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2, and 1 is what can be read"),
        ({"version": -1}, "version -1"),
        ({"placement": [0]}, "1 slices are placed"),
        ({"files": []}, "0 files"),
        ({"version": 6}, "the record is of step 5"),
        ({"files": [{"name": "../x", "byte_count": 1, "sha256": "0" * 64}]}, "'../x'"),
        ({"files": [{"name": "shard-0-state.safetensors", "byte_count": 1, "sha256": ""}]}, "file"),
    ],
)
def test_what_cannot_be_right_is_named(
    folder: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    content = json.loads((folder / NAME).read_text()) | changes
    (tmp_path / NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointUnreadable, match=message):
        read_manifest(tmp_path)


def test_one_that_is_too_large_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "MANIFEST_BYTES_MAX", 10)
    with pytest.raises(CheckpointUnreadable, match="10 are allowed"):
        read_manifest(folder)


def test_without_one_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnreadable, match="never completed"):
        read_manifest(tmp_path)
