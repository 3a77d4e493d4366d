"""What shards write is what shards read, whatever their number; damage is found, and named."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.storage.stored import SPEC, filled, same, shapes_of, spec_of, stored

from adashard.wire.errors import CheckpointUnreadable, CheckpointUnwritable
from adashard.wire.messages import Content
from adashard.wire.placement import cut
from adashard_server.storage.manifest import read_manifest
from adashard_server.storage.reading import check_files, read_slices
from adashard_server.storage.snapshot import write_snapshot

SHAPES = st.lists(st.integers(1, 9), max_size=4).map(tuple)


def read(folder: Path, spec=SPEC, indices=None) -> dict:
    pieces = cut(spec)
    momentum = spec.groups[0].adafactor.momentum
    wanted = range(len(pieces)) if indices is None else indices
    shapes = {index: shapes_of(pieces[index], momentum=momentum) for index in wanted}
    return dict(read_slices(folder, shapes))


@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    slice_bytes=st.sampled_from([64, 256, 4096]),
    momentum=st.booleans(),
    chooser=st.randoms(use_true_random=False),
)
@settings(max_examples=40)
def test_any_slices_are_read_as_any_number_of_shards_wrote_them(
    tmp_path_factory: pytest.TempPathFactory, shapes, slice_bytes, momentum, chooser
) -> None:
    spec = spec_of(*shapes, slice_bytes=slice_bytes, momentum=momentum)
    held = filled(spec, seed=chooser.randrange(100))
    placement = [chooser.randrange(4) for _ in held]
    folder = stored(tmp_path_factory.mktemp("any"), held, spec, placement=placement)
    check_files(folder, read_manifest(folder))
    wanted = [index for index in held if chooser.random() < 0.7]
    found = read(folder, spec, wanted)
    assert list(found) == wanted
    assert all(same(found[index], held[index]) for index in wanted)


def test_slices_are_spread_over_more_files_where_one_would_hold_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adashard_server.storage.snapshot.SLICES_PER_FILE", 3)
    held = filled(SPEC)
    folder = stored(tmp_path, held)
    assert len(list(folder.glob("shard-0-weights*"))) == -(-len(held) // 3)
    assert all(same(one, held[index]) for index, one in read(folder).items())


def test_a_slice_that_is_not_finite_is_told(tmp_path: Path) -> None:
    held = filled(SPEC)
    held[1][Content.WEIGHT].view(-1)[0] = torch.inf
    held[3][next(one for one in held[3] if one is not Content.WEIGHT)].view(-1)[0] = torch.nan
    _, not_finite = write_snapshot(tmp_path, 0, SPEC, cut(SPEC), held)
    assert not_finite == (1, 3)


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two shards."""
    held = filled(SPEC)
    return stored(tmp_path_factory.mktemp("whole"), held, placement=[i % 2 for i in held])


@given(chooser=st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_a_flipped_bit_is_found_and_the_file_named(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, chooser
) -> None:
    folder = tmp_path_factory.mktemp("flipped") / whole.name
    shutil.copytree(whole, folder)
    path = chooser.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    place = chooser.randrange(len(data))
    data[place] ^= 1 << chooser.randrange(8)
    path.write_bytes(data)
    with pytest.raises(CheckpointUnreadable) as found:
        check_files(folder, read_manifest(folder))
    assert found.value.facts["file"] == str(path)
    header = 8 + int.from_bytes(whole.joinpath(path.name).read_bytes()[:8], "little")
    assert place < header or found.value.facts["tensor"] in found.value.message
    assert found.value.remedy


def test_only_the_slice_that_is_damaged_cannot_be_read(tmp_path: Path) -> None:
    held = filled(SPEC)
    folder = stored(tmp_path, held)
    path = folder / "shard-0-weights.safetensors"
    data = bytearray(path.read_bytes())
    place = data.index(held[2][Content.WEIGHT].numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    others = [index for index in held if index != 2]
    assert read(folder, indices=others).keys() == set(others)
    with pytest.raises(CheckpointUnreadable, match=r"damaged in tensor 'layer/0.weight/2'"):
        read(folder, indices=[2])


def test_a_missing_file_and_one_cut_short_are_named(tmp_path: Path) -> None:
    folder = stored(tmp_path, filled(SPEC))
    path = folder / "shard-0-state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointUnreadable, match=r"shard-0-state.* has \d+ bytes, and \d+ were"):
        read(folder)
    path.unlink()
    with pytest.raises(CheckpointUnreadable, match=r"shard-0-state.safetensors is missing"):
        read(folder)
    with pytest.raises(CheckpointUnreadable, match=r"shard-0-state.safetensors is missing"):
        check_files(folder, read_manifest(folder))


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = stored(tmp_path, filled(SPEC))
    wanted = {0: {Content.WEIGHT: (2, 3)}}
    with pytest.raises(CheckpointUnreadable, match=r"'layer/0.weight/0' as .* not as \(2, 3\)"):
        dict(read_slices(folder, wanted))


def test_slices_and_tensors_that_are_not_in_it_are_refused(tmp_path: Path) -> None:
    folder = stored(tmp_path, filled(SPEC))
    with pytest.raises(CheckpointUnreadable, match="no slice 99"):
        dict(read_slices(folder, {99: {Content.WEIGHT: ()}}))
    with pytest.raises(CheckpointUnreadable, match="do not hold tensor 'layer/0"):
        dict(read_slices(folder, {0: {Content.MOMENTUM: (2, 3)}}))


# --- disks that refuse ---------------------------------------------------------------------------


@contextmanager
def files_no_longer_than(byte_count: int) -> Iterator[None]:
    """Has the system refuse longer files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (byte_count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_is_told_with_the_file(tmp_path: Path) -> None:
    with (
        files_no_longer_than(100),
        pytest.raises(CheckpointUnwritable, match=r"shard-1-weights.*File too large") as found,
    ):
        write_snapshot(tmp_path, 1, SPEC, cut(SPEC), filled(SPEC))
    assert found.value.facts["file"].endswith("shard-1-weights.safetensors")


def test_a_directory_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("")
    with pytest.raises(CheckpointUnwritable, match=r"occupied.*cannot be written"):
        write_snapshot(tmp_path / "occupied", 0, SPEC, cut(SPEC), filled(SPEC))
