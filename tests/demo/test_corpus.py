from itertools import islice
from pathlib import PurePosixPath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adashard_server.demo.corpus import batches, is_held_out, read_corpus, sample

NAMES = [f"package{number}/module{number}.py" for number in range(100)]


@pytest.fixture
def library(tmp_path):
    """A tree of training files that hold nothing but 't', and held-out ones of 'h'."""
    for name in NAMES:
        letter = "h" if is_held_out(PurePosixPath(name)) else "t"
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(letter * 50)
    return tmp_path


def test_no_byte_of_a_held_out_file_is_trained_on(library):
    corpus = read_corpus(library)
    assert set(corpus.training.tolist()) == {ord("t"), 0}
    assert set(corpus.held_out.tolist()) == {ord("h"), 0}
    drawn = batches(corpus.training, count=8, length=9, stream="a")
    for batch in islice(drawn, 50):
        assert ord("h") not in batch


def test_every_file_is_on_one_of_the_two_sides(library):
    corpus = read_corpus(library)
    assert corpus.held_out_files == sum(is_held_out(PurePosixPath(name)) for name in NAMES) > 0
    assert corpus.training_files + corpus.held_out_files == len(NAMES)
    assert len(corpus.training) + len(corpus.held_out) == len(NAMES) * (50 + 1)


@pytest.mark.parametrize(
    ("path", "held_out"),
    [("os.py", False), ("json/decoder.py", False), ("gzip.py", True), ("asyncio/events.py", True)],
)
def test_the_side_of_a_file_is_the_same_on_every_machine(path, held_out):
    assert is_held_out(PurePosixPath(path)) is held_out


def test_about_a_twentieth_of_the_files_is_held_out():
    paths = [PurePosixPath(f"module{number}.py") for number in range(10_000)]
    assert 400 < sum(map(is_held_out, paths)) < 600


@pytest.mark.parametrize("folder", ["site-packages", "test", "encodings"])
def test_what_is_not_the_library_itself_is_left_out(library, folder):
    before = read_corpus(library)
    stranger = library / "package1" / folder / "stranger.py"
    stranger.parent.mkdir()
    stranger.write_text("x" * 50)
    after = read_corpus(library)
    assert torch.equal(before.training, after.training)
    assert torch.equal(before.held_out, after.held_out)


def test_a_library_without_sources_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no Python sources"):
        read_corpus(tmp_path)


@pytest.mark.slow
def test_the_running_pythons_library_has_text_enough_on_both_sides():
    corpus = read_corpus()
    assert len(corpus.training) > 5_000_000
    assert len(corpus.held_out) > 100_000


@given(
    size=st.integers(1, 256), length=st.integers(1, 256), count=st.integers(1, 8), stream=st.text()
)
def test_every_window_of_a_batch_is_a_run_of_the_text(size, length, count, stream):
    text = torch.arange(size, dtype=torch.uint8)
    length = min(length, size)
    batch = next(batches(text, count=count, length=length, stream=stream))
    assert batch.shape == (count, length)
    assert batch.dtype == torch.int64
    assert bool((batch.diff(dim=1) == 1).all())


def test_a_stream_draws_the_same_again_and_another_stream_draws_others():
    text = torch.arange(256, dtype=torch.uint8)

    def drawn(stream):
        windows = batches(text, count=4, length=8, stream=stream)
        return torch.stack(list(islice(windows, 5)))

    assert torch.equal(drawn("seed 0, worker 0"), drawn("seed 0, worker 0"))
    assert not torch.equal(drawn("seed 0, worker 0"), drawn("seed 0, worker 1"))
    assert not torch.equal(drawn("seed 0, worker 0"), drawn("seed 1, worker 0"))


@given(size=st.integers(1, 256), length=st.integers(1, 64), count=st.integers(1, 64))
def test_a_sample_shows_no_byte_twice_and_as_many_windows_as_fit(size, length, count):
    text = torch.arange(size, dtype=torch.uint8)
    length = min(length, size)
    seen = sample(text, count=count, length=length)
    assert seen.shape == (min(count, size // length), length)
    assert len(seen.unique()) == seen.numel()
