"""What int8 has left of a worker's gradients, in the dict that its state is saved in."""

from __future__ import annotations

import io

import pytest
import torch
from tests.client.test_state_dict import SPEC, parameters

from adashard.state_dict import REMOTE, WIRE, pack, unpack_wire
from adashard.wire.errors import InvalidRequest, ModelMismatch

SHAPES = [one.shape for one in SPEC.parameters]
NOTHING = {"dtype": None, "residuals": {}}


def saved(wire: object) -> dict:
    """A dict as it comes back from a file."""
    found = pack(None, SPEC, parameters(), [], job="j", to_transformers=False)
    found[REMOTE][WIRE] = wire
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_residuals_come_back_bit_for_bit():
    residuals = {index: torch.randn(shape) for index, shape in enumerate(SHAPES)}
    found = unpack_wire(saved({"dtype": "int8", "residuals": residuals}), SPEC)
    assert found["dtype"] == "int8"
    assert found["residuals"].keys() == residuals.keys()
    assert all(torch.equal(found["residuals"][index], one) for index, one in residuals.items())


def test_a_worker_that_has_nothing_left_to_send_saves_nothing_of_it():
    found = pack(None, SPEC, parameters(), [], job="j", to_transformers=False, wire={})
    assert WIRE not in found[REMOTE]
    assert unpack_wire(found, SPEC) == NOTHING


@pytest.mark.parametrize("remote", [{}, {REMOTE: None}, {REMOTE: {}}])
def test_a_dict_of_a_library_has_no_residuals(remote):
    assert unpack_wire(remote, SPEC) == NOTHING


def test_a_residual_of_another_shape_is_another_models():
    residuals = {0: torch.zeros(*SHAPES[0], 2)}
    with pytest.raises(ModelMismatch, match="has a residual of"):
        unpack_wire(saved({"dtype": "int8", "residuals": residuals}), SPEC)


def test_a_residual_that_is_not_finite_is_refused():
    residuals = {0: torch.full(SHAPES[0], torch.inf)}
    with pytest.raises(InvalidRequest, match="residual of parameter 0"):
        unpack_wire(saved({"dtype": "int8", "residuals": residuals}), SPEC)


@pytest.mark.parametrize(
    "wire",
    [
        3,
        {},
        {"dtype": "int8"},
        {"dtype": "int4", "residuals": {}},
        {"dtype": "auto", "residuals": {}},
        {"dtype": "int8", "residuals": []},
        {"dtype": "int8", "residuals": {-1: torch.ones(1)}},
        {"dtype": "int8", "residuals": {len(SHAPES): torch.ones(1)}},
        {"dtype": "int8", "residuals": {"0": torch.ones(1)}},
        {"dtype": "int8", "residuals": {0: 1.0}},
    ],
)
def test_what_we_have_not_written_is_refused(wire):
    with pytest.raises(InvalidRequest, match="'remote' in the state dict"):
        unpack_wire(saved(wire), SPEC)
