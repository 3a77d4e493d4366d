"""The golden files are what was recorded, and the checker lets nothing through."""

from __future__ import annotations

import pytest
import torch
from tests.golden.trajectories import CONFIGS, DATA, TENSORS, digest, recorded_digests

PAPER = CONFIGS["paper_default"]


def test_every_file_is_as_it_was_recorded():
    assert {file: digest(file) for file in recorded_digests()} == recorded_digests()


def test_every_file_is_listed():
    files = {path.name for path in DATA.glob("*.safetensors")}
    assert files == set(recorded_digests())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_has_its_weight_stored_at_every_saved_step(name):
    config = CONFIGS[name]
    for tensor in TENSORS:
        assert all(config.stores(tensor, "x", step) for step in config.saved_steps)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_libraries_computed_in_float32_is_within_tolerance(name):
    config = CONFIGS[name]
    for library in ("hf", "torch", "optax"):
        results = {
            (tensor, "x", config.last_step): found
            for tensor in TENSORS
            if (found := config.expected(tensor, "x", config.last_step, by=library)) is not None
        }
        assert config.differences(results) == []


def test_a_weight_that_is_off_by_more_than_the_tolerance_is_refused():
    standard = PAPER.expected("sq", "x", 25)
    allowed = PAPER.allowed("sq", "x", 25)
    assert PAPER.differences({("sq", "x", 25): standard + 0.9 * allowed}) == []
    assert len(PAPER.differences({("sq", "x", 25): standard + 1.1 * allowed})) == 1


def test_a_weight_that_is_not_a_number_is_refused():
    found = torch.full((16, 16), torch.nan)
    assert len(PAPER.differences({("sq", "x", 25): found})) == 1


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(AssertionError, match="sq"):
        PAPER.differences({("sq", "x", 25): torch.zeros(16)})


def test_bf16_configurations_begin_with_rounded_weights_and_gradients():
    config = CONFIGS["bf16_hf"]
    for rounded in (config.start("sq"), config.gradient("sq", 3)):
        assert torch.equal(rounded.bfloat16().double(), rounded)


def test_gradients_of_several_workers_are_averaged():
    config = CONFIGS["accumulate_w3"]
    workers = config.worker_gradients("t3", 2)
    assert workers.shape == (3, 3, 5, 8)
    assert torch.equal(config.gradient("t3", 2), workers.mean(dim=0))
