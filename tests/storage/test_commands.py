"""`adashard checkpoint`: what people see of a directory, and of what is wrong in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.storage.stored import SPEC, filled, stored
from typer.testing import CliRunner

from adashard.wire.errors import CannotReachServer, CheckpointUnwritable
from adashard_server.cli import app


def run(*arguments: object):
    return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two checkpoints of a job, and one that is damaged."""
    held = filled(SPEC)
    stored(tmp_path, held, version=5, values={"loss": 2.5})
    stored(tmp_path, held, version=10, not_finite=("loss",), kept=True)
    folder = stored(tmp_path, held, version=15)
    (folder / "manifest.json").write_text("{")
    return tmp_path


def test_a_list_shows_steps_losses_and_what_is_wrong(directory: Path) -> None:
    done = run("list", "--checkpoint-dir", directory)
    first, second = done.stdout.splitlines()[1:]
    assert first.split()[:3] == ["job", "step-5", "5"]
    assert "2.5000" in first
    assert second.endswith("not finite: loss; kept")
    assert "step-15" in done.stderr
    assert "damaged" in done.stderr


def test_a_list_for_programs_is_json(directory: Path) -> None:
    done = run("list", "--checkpoint-dir", directory, "--job", "job", "--format", "json")
    assert [one["version"] for one in json.loads(done.stdout)] == [5, 10]
    assert run("list", "--checkpoint-dir", directory, "--job", "another").stdout == ""


def test_verifying_names_what_is_damaged_and_fails(directory: Path) -> None:
    assert run("verify", directory / "job" / "step-5").exit_code == 0
    path = directory / "job" / "step-10" / "shard-0-weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    done = run("verify", directory)
    assert done.exit_code == 1
    assert "step-5: whole" in done.stdout
    assert "damaged in tensor" in done.stderr
    assert "step-15" in done.stderr


def test_verifying_what_is_no_checkpoint_fails(tmp_path: Path) -> None:
    done = run("verify", tmp_path, tmp_path / "nothing")
    assert done.exit_code == 1
    assert done.stderr.count("never completed") == 2


def test_exporting_says_which_files_it_wrote(directory: Path, tmp_path: Path) -> None:
    done = run("export", directory / "job" / "step-5", tmp_path / "out")
    assert [Path(line).name for line in done.stdout.split()] == [
        "model.safetensors",
        "optimizer.pt",
    ]


def test_making_one_without_a_cluster_says_where_it_looked() -> None:
    done = run("create", "job", "--url", "http://127.0.0.1:1")
    assert isinstance(done.exception, CannotReachServer)
    assert "127.0.0.1:1" in str(done.exception)


def test_a_refusal_of_the_cluster_is_the_error_that_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    problem = {"code": "CheckpointUnwritable", "detail": "full", "hint": "make room", "facts": {}}
    answers = iter([httpx.Response(400, json=problem), httpx.Response(502, text="gateway")])
    asked = []

    def post(url: str, **options) -> httpx.Response:
        asked.append((url, options["headers"]))
        answer = next(answers)
        answer.request = httpx.Request("POST", url)
        return answer

    monkeypatch.setattr(httpx, "post", post)
    done = run("create", "a/b", "--url", "http://c", "--token", "secret")
    assert isinstance(done.exception, CheckpointUnwritable)
    assert done.exception.remedy == "make room"
    assert asked == [("http://c/api/v1/jobs/a%2Fb/checkpoints", {"authorization": "Bearer secret"})]
    assert isinstance(run("create").exception, CannotReachServer)
