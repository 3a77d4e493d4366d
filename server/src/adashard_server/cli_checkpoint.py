"""`adashard checkpoint`: makes one, and looks at those that there are.

`create` asks a running cluster. The others read the directory, and need no cluster.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from adashard.wire.errors import AdashardError, CannotReachServer, CheckpointUnreadable, from_info
from adashard.wire.messages import ErrorInfo
from adashard_server.config import HTTP_PORT

if TYPE_CHECKING:
    import httpx

    from adashard_server.storage.manifest import Manifest

commands = typer.Typer(no_args_is_help=True, help="Make, list, verify and export checkpoints.")

CREATE_S_MAX = 660.0  # longer than the coordinator waits

CheckpointDir = Annotated[
    Path, typer.Option(envvar="ADASHARD_CHECKPOINT_DIR", help="Directory of checkpoints.")
]
Folder = Annotated[Path, typer.Argument(help="A checkpoint, e.g. checkpoints/job/step-100.")]


@commands.command()
def create(
    job: Annotated[str, typer.Argument(help="Name of the job.")] = "default",
    url: Annotated[
        str, typer.Option(envvar="ADASHARD_URL", help="The coordinator's REST URL.")
    ] = f"http://127.0.0.1:{HTTP_PORT}",
    token: Annotated[str, typer.Option(envvar="ADASHARD_TOKEN", help="The cluster's secret.")] = "",
) -> None:
    """Make a checkpoint of a job as it is now; it is kept until somebody removes it."""
    import httpx

    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.post(
            f"{url}/api/v1/jobs/{quote(job, safe='')}/checkpoints",
            headers=headers,
            timeout=CREATE_S_MAX,
            trust_env=False,
        )
    except httpx.HTTPError as error:
        raise CannotReachServer(f"no adashard REST at {url} ({error})", url=url) from None
    if answer.is_error:
        raise _refused(answer)
    made = answer.json()
    typer.echo(
        f"{made['name']}: step {made['version']}, {made['size_bytes'] / 1e6:.1f} MB; "
        f"steps waited {1e3 * made['stall_s']:.1f} ms at most"
    )


@commands.command("list")
def list_checkpoints(
    checkpoint_dir: CheckpointDir,
    job: Annotated[str | None, typer.Option(help="Only those of this job.")] = None,
    format: Annotated[str, typer.Option(help="default or json.")] = "default",
) -> None:
    """Show what is in a directory, oldest first, and what of it is damaged."""
    from adashard_server.storage.checkpoints import Damaged, checkpoints

    found = checkpoints(checkpoint_dir, job)
    whole = [one for one in found if not isinstance(one, Damaged)]
    if format == "json":
        typer.echo(json.dumps([_described(one) for one in whole], indent=2))
    elif whole:
        typer.echo(f"{'job':<20} {'checkpoint':<16} {'step':>9} {'MB':>10} {'loss':>10}  written")
        for one in whole:
            typer.echo(_line(one))
    for damaged in found:
        if isinstance(damaged, Damaged):
            typer.echo(f"damaged: {damaged.error.message}", err=True)


@commands.command()
def verify(
    folders: Annotated[list[Path], typer.Argument(help="Checkpoints, or directories of them.")],
) -> None:
    """Read every byte, and compare it with what was written. Exit code 1 if anything differs."""
    from adashard_server.storage.manifest import read_manifest
    from adashard_server.storage.reading import check_files

    wrong = 0
    for folder in (one for each in folders for one in _checkpoints_in(each)):
        try:
            manifest = read_manifest(folder)
            check_files(folder, manifest)
        except CheckpointUnreadable as error:
            wrong += 1
            typer.echo(f"{folder}: {error.message}", err=True)
        else:
            typer.echo(f"{folder}: whole, {manifest.byte_count / 1e6:.1f} MB")
    if wrong:
        raise typer.Exit(1)


@commands.command()
def export(
    folder: Folder,
    target: Annotated[Path, typer.Argument(help="Where to write; made where it is missing.")],
    to_transformers: Annotated[
        bool, typer.Option("--transformers", help="optimizer.pt for transformers.Adafactor.")
    ] = False,
    shard_gb: Annotated[
        float, typer.Option(min=0.001, help="Size of a file of weights, at most.")
    ] = 5.0,
) -> None:
    """Write model.safetensors, as Hugging Face has it, and optimizer.pt, as torch has it."""
    from adashard_server.export import export as write

    files = write(
        folder, target, to_transformers=to_transformers, shard_bytes=round(shard_gb * 1e9)
    )
    for file in files:
        typer.echo(str(file))


def _checkpoints_in(folder: Path) -> list[Path]:
    """A checkpoint itself, or all that are in a directory of them."""
    from adashard_server.storage.checkpoints import Damaged, checkpoint_folder, checkpoints
    from adashard_server.storage.manifest import NAME

    if (folder / NAME).exists() or not folder.is_dir():
        return [folder]
    found = checkpoints(folder)
    if not found:
        return [folder]  # of which is said then that it is no checkpoint
    return [
        one.path if isinstance(one, Damaged) else checkpoint_folder(folder, one.job, one.name)
        for one in found
    ]


def _described(manifest: Manifest) -> dict[str, Any]:
    return {
        "job": manifest.job,
        "name": manifest.name,
        "version": manifest.version,
        "generation": manifest.generation,
        "size_bytes": manifest.byte_count,
        "shard_count": max(manifest.placement) + 1,
        "values": dict(manifest.values),
        "not_finite": list(manifest.not_finite),
        "kept": manifest.kept,
        "written_at": _time(manifest),
    }


def _line(manifest: Manifest) -> str:
    loss = f"{manifest.values['loss']:.4f}" if "loss" in manifest.values else "-"
    notes = [f"not finite: {', '.join(manifest.not_finite[:3])}"] if manifest.not_finite else []
    notes += ["kept"] if manifest.kept else []
    return (
        f"{manifest.job:<20} {manifest.name:<16} {manifest.version:>9} "
        f"{manifest.byte_count / 1e6:>10.1f} {loss:>10}  {_time(manifest)}  {'; '.join(notes)}"
    ).rstrip()


def _time(manifest: Manifest) -> str:
    return datetime.fromtimestamp(manifest.written_at_s, UTC).isoformat(timespec="seconds")


def _refused(answer: httpx.Response) -> AdashardError:
    """The error of the catalogue that a problem document describes."""
    try:
        problem = answer.json()
        info = ErrorInfo(
            reason=problem["code"],
            message=problem["detail"],
            remedy=problem["hint"],
            metadata=problem["facts"],
        )
    except (ValueError, KeyError, TypeError):
        return CannotReachServer(f"{answer.url} answered {answer.status_code}, and no adashard")
    return from_info(info)
