"""What others load of a checkpoint is what shards have written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.storage.stored import filled, record_of, spec_of, stored

import adashard
from adashard.schedule import beta2, rho
from adashard.state import moment_shapes, part_of
from adashard.wire.errors import CheckpointUnreadable
from adashard.wire.messages import AdafactorStep, Content, GroupStep, Schedule
from adashard.wire.placement import cut
from adashard.wire.spec import AdafactorLayout, EpsPlacement, Group
from adashard_server.export import export

SPEC = spec_of((8, 6), (40,), (3, 4, 5))
STEP = 5


def group_step(**settings) -> GroupStep:
    options = {"eps1": 1e-30, "eps2": 1e-3, "clip_threshold": 1.5, "weight_decay": 0.1}
    relative = {"lr": settings.get("lr") or None, "relative_step": "lr" not in settings}
    return GroupStep(
        adafactor=AdafactorStep(**(options | settings)),
        schedules=(
            Schedule(
                step_count=STEP,
                beta2=beta2(STEP, decay_rate=-0.7, step_offset=0),
                rho=rho(STEP, **relative, warmup_init=False),
            ),
        ),
    )


def whole_model(spec=SPEC) -> list[dict]:
    """Weights and moments of each parameter; moments are not negative, as no mean of squares is."""
    generator = torch.Generator().manual_seed(1)
    layout = spec.groups[0].adafactor
    return [
        {
            Content.WEIGHT: torch.randn(one.shape, generator=generator),
            **{
                content: torch.rand(shape, generator=generator)
                for content, shape in moment_shapes(one.shape, layout).items()
            },
        }
        for one in spec.parameters
    ]


def checkpoint(directory: Path, model: list[dict], spec=SPEC, **settings) -> Path:
    held = {
        piece.index: {
            content: part_of(whole, piece, content).clone()
            for content, whole in model[piece.parameter].items()
        }
        for piece in cut(spec)
    }
    record = replace(record_of(STEP, spec), groups=(group_step(**settings),))
    placement = [index % 3 for index in held]
    return stored(directory, held, spec, placement=placement, record=record)


def test_weights_are_those_of_the_model_under_their_names(tmp_path: Path) -> None:
    model = whole_model()
    export(checkpoint(tmp_path, model), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {parameter.name for parameter in SPEC.parameters}
    for parameter, one in zip(SPEC.parameters, model, strict=True):
        assert torch.equal(found[parameter.name], one[Content.WEIGHT])


def test_a_large_model_is_several_files_and_an_index(tmp_path: Path) -> None:
    model = whole_model()
    out = tmp_path / "out"
    files = export(checkpoint(tmp_path, model), out, shard_bytes=400)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (48 + 40 + 60)
    assert index["weight_map"] == {
        "layer/0.weight": "model-00001-of-00002.safetensors",
        "layer/1.weight": "model-00001-of-00002.safetensors",
        "layer/2.weight": "model-00002-of-00002.safetensors",
    }
    for name, file in index["weight_map"].items():
        number = next(n for n, one in enumerate(SPEC.parameters) if one.name == name)
        assert torch.equal(load_file(out / file)[name], model[number][Content.WEIGHT])
    assert [file.name for file in files] == [
        *sorted(set(index["weight_map"].values())),
        "model.safetensors.index.json",
        "optimizer.pt",
    ]


def test_torch_goes_on_from_its_state(tmp_path: Path) -> None:
    layout = AdafactorLayout(eps_placement=EpsPlacement.CLAMPED)
    spec = replace(SPEC, groups=(Group(adafactor=layout),))
    model = whole_model(spec)
    export(checkpoint(tmp_path, model, spec, lr=0.02, eps1=0.25), tmp_path / "out")
    parameters = [torch.nn.Parameter(one[Content.WEIGHT].clone()) for one in model]
    optimizer = torch.optim.Adafactor(parameters)
    optimizer.load_state_dict(torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["beta2_decay"], group["d"]) == (0.02, -0.7, 1.5)
    assert (group["eps"], group["weight_decay"]) == ((0.25, 1e-3), 0.1)
    state = optimizer.state[parameters[0]]
    assert float(state["step"]) == STEP
    assert torch.equal(state["row_var"].view(-1), model[0][Content.ROW].view(-1))
    assert torch.equal(state["col_var"].view(-1), model[0][Content.COLUMN].view(-1))
    assert torch.equal(optimizer.state[parameters[1]]["variance"], model[1][Content.VECTOR])
    assert group.keys() >= torch.optim.Adafactor(parameters).param_groups[0].keys()


@pytest.mark.parametrize("lr", [None, 0.003])
@pytest.mark.parametrize("to_transformers", [False, True])
def test_adashard_goes_on_from_it_with_the_same_settings(
    tmp_path: Path, lr: float | None, to_transformers: bool
) -> None:
    model = whole_model()
    settings = {} if lr is None else {"lr": lr}
    folder = checkpoint(tmp_path, model, **settings)
    export(folder, tmp_path / "out", to_transformers=to_transformers)
    saved = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)
    named = [
        (parameter.name, torch.nn.Parameter(one[Content.WEIGHT]))
        for parameter, one in zip(SPEC.parameters, model, strict=True)
    ]
    optimizer = adashard.Adafactor(named, job="exported")
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["relative_step"]) == (lr, lr is None)
    assert (group["decay_rate"], group["clip_threshold"]) == (-0.7, 1.5)
    assert (group["eps"], group["weight_decay"], group["warmup_init"]) == (
        (1e-30, 1e-3),
        0.1,
        False,
    )
    assert saved["remote"]["version"] == STEP


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, whole_model())
    path = folder / "shard-1-state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointUnreadable, match=r"shard-1-state.* damaged in tensor"):
        export(folder, tmp_path / "out")


def test_weights_without_a_step_come_with_fresh_state(tmp_path: Path) -> None:
    held = filled(SPEC)
    export(stored(tmp_path, held, SPEC, version=0), tmp_path / "out")
    saved = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)
    assert saved["state"] == {}
    assert saved["param_groups"][0]["params"] == [0, 1, 2]
