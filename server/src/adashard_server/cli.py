"""The `adashard` command. Answers go to standard output, everything else to standard error.

Exit codes: 0 done, 1 an error of the catalogue (printed with its remedy), 2 a usage error,
3 another coordinator has taken over, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Annotated, Any

import typer

from adashard.wire.errors import AdashardError, CannotReachServer
from adashard.wire.placement import DEFAULT_SLICE_BYTES, SLICE_BYTES_MAX, SLICE_BYTES_MIN
from adashard.wire.version import VERSION
from adashard_server import cli_checkpoint
from adashard_server.cluster.checkpoints import CheckpointSettings
from adashard_server.cluster.leases import LeaseSettings
from adashard_server.cluster.strikes import STRIKES
from adashard_server.config import GRPC_PORT, HTTP_PORT, CoordinatorSettings, ShardSettings
from adashard_server.demo.chaos import Victim
from adashard_server.launch.restarts import TAKEN_OVER

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adashard: an optimizer as a service for PyTorch.",
)
serve = typer.Typer(no_args_is_help=True, help="Run one process of a cluster.")
app.add_typer(serve, name="serve")
app.add_typer(cli_checkpoint.commands, name="checkpoint")

Bind = Annotated[str, typer.Option(envvar="ADASHARD_BIND", help="Address to listen on.")]
Advertise = Annotated[
    str | None,
    typer.Option(envvar="ADASHARD_ADVERTISE", help="Host that others reach this process at."),
]
Port = Annotated[int, typer.Option(envvar="ADASHARD_PORT", help="gRPC port; 0 for a free one.")]
HttpPort = Annotated[
    int, typer.Option(envvar="ADASHARD_HTTP_PORT", help="REST and page; 0 for a free one.")
]
Registry = Annotated[str, typer.Option(envvar="ADASHARD_REGISTRY", help="'memory' or a Redis URL.")]
MinShards = Annotated[
    int, typer.Option(envvar="ADASHARD_MIN_SHARDS", min=1, help="Shards the first step needs.")
]
SliceBytes = Annotated[
    int,
    typer.Option(
        envvar="ADASHARD_SLICE_BYTES",
        min=SLICE_BYTES_MIN,
        max=SLICE_BYTES_MAX,
        help="Size of slices, where a job leaves it open.",
    ),
]
Strikes = Annotated[
    int,
    typer.Option(
        envvar="ADASHARD_STRIKES",
        min=0,
        help="Steps in a row with NaN or Inf after which a worker is evicted; 0 for never.",
    ),
]
MaxUpdateRms = Annotated[
    float,
    typer.Option(
        envvar="ADASHARD_MAX_UPDATE_RMS",
        min=0.0,
        help="RMS of an update above which a step is told of; 0 for what is unusual only.",
    ),
]
Token = Annotated[str, typer.Option(envvar="ADASHARD_TOKEN", help="The cluster's secret.")]
LogLevel = Annotated[str, typer.Option(envvar="ADASHARD_LOG_LEVEL", help="DEBUG to ERROR.")]
LeaseS = Annotated[
    float,
    typer.Option(
        envvar="ADASHARD_LEASE_S", help="Seconds of silence after which a member counts as dead."
    ),
]
GraceS = Annotated[
    float,
    typer.Option(
        envvar="ADASHARD_GRACE_S",
        help="Seconds that a member has to come back whose control stream has broken.",
    ),
]
RenewS = Annotated[
    float,
    typer.Option(envvar="ADASHARD_RENEW_S", help="Seconds between two renewals of a member."),
]
ReplaceAfterS = Annotated[
    float,
    typer.Option(
        envvar="ADASHARD_REPLACE_AFTER_S",
        help="Seconds that a dead shard is waited for before the others take its slices.",
    ),
]
CheckpointDir = Annotated[
    str,
    typer.Option(
        envvar="ADASHARD_CHECKPOINT_DIR",
        help="Directory of checkpoints, on a file system that the coordinator and all shards see.",
    ),
]
CheckpointEvery = Annotated[
    int,
    typer.Option(
        envvar="ADASHARD_CHECKPOINT_EVERY",
        min=0,
        help="Steps from checkpoint to checkpoint; 0 for those only that are asked for.",
    ),
]
KeepLast = Annotated[
    int,
    typer.Option(
        envvar="ADASHARD_KEEP_LAST", min=0, help="How many of the newest are kept; 0 keeps all."
    ),
]
KeepBest = Annotated[
    int,
    typer.Option(
        envvar="ADASHARD_KEEP_BEST",
        min=0,
        help="How many of the least logged loss are kept beside them.",
    ),
]
Resume = Annotated[
    str,
    typer.Option(
        envvar="ADASHARD_RESUME",
        help="'latest' to begin jobs from their newest checkpoint, or the folder of one.",
    ),
]
Standby = Annotated[
    bool, typer.Option(hidden=True, help="Begin when a line comes on standard input.")
]
Supervised = Annotated[bool, typer.Option(hidden=True, help="End when standard input ends.")]
Coordinator = Annotated[
    str, typer.Option(envvar="ADASHARD_COORDINATOR", help="host:port of the coordinator.")
]
Device = Annotated[str, typer.Option(envvar="ADASHARD_DEVICE", help="auto, cpu or cuda:N.")]
Url = Annotated[str, typer.Option(envvar="ADASHARD_URL", help="The coordinator's REST URL.")]


@serve.command("coordinator")
def serve_coordinator(
    bind: Bind = "127.0.0.1",
    advertise: Advertise = None,
    port: Port = GRPC_PORT,
    http_port: HttpPort = HTTP_PORT,
    registry: Registry = "memory",
    min_shards: MinShards = 1,
    slice_bytes: SliceBytes = DEFAULT_SLICE_BYTES,
    strikes: Strikes = STRIKES,
    max_update_rms: MaxUpdateRms = 0.0,
    token: Token = "",
    lease_s: LeaseS = LeaseSettings().lease_s,
    grace_s: GraceS = LeaseSettings().grace_s,
    renew_s: RenewS = LeaseSettings().renew_s,
    replace_after_s: ReplaceAfterS = LeaseSettings().replace_after_s,
    checkpoint_dir: CheckpointDir = "",
    checkpoint_every: CheckpointEvery = 0,
    keep_last: KeepLast = CheckpointSettings().keep_last,
    keep_best: KeepBest = CheckpointSettings().keep_best,
    resume: Resume = "",
    log_level: LogLevel = "INFO",
    supervised: Supervised = False,
) -> None:
    """Control plane (gRPC), REST and the page, in one process."""
    from adashard_server.app.coordinator import CoordinatorProcess
    from adashard_server.telemetry import logs

    settings = CoordinatorSettings(
        bind=bind,
        advertise=advertise,
        port=port,
        http_port=http_port,
        registry=registry,
        min_shards=min_shards,
        slice_bytes=slice_bytes,
        strikes=strikes,
        max_update_rms=max_update_rms,
        leases=LeaseSettings(
            lease_s=lease_s, grace_s=grace_s, renew_s=renew_s, replace_after_s=replace_after_s
        ),
        token=token,
        checkpoint_dir=checkpoint_dir,
        checkpoints=CheckpointSettings(
            every_steps=checkpoint_every, keep_last=keep_last, keep_best=keep_best
        ),
        resume=resume,
    )

    async def run() -> str:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if supervised:
            _when_abandoned(lambda: loop.call_soon_threadsafe(stop.set))
        process = CoordinatorProcess(settings)
        logs.configure(log_level, on_record=process.metrics.count_record)
        return await process.run(stop, lambda p: _ready({"address": p.address, "url": p.url}))

    reason = asyncio.run(run())
    if reason:
        typer.echo(f"another coordinator has taken over: {reason}", err=True)
        raise typer.Exit(TAKEN_OVER)


@serve.command("shard")
def serve_shard(
    coordinator: Coordinator = ShardSettings().coordinator,
    bind: Bind = "127.0.0.1",
    advertise: Advertise = None,
    port: Port = 0,
    device: Device = "auto",
    token: Token = "",
    checkpoint_dir: CheckpointDir = "",
    log_level: LogLevel = "INFO",
    supervised: Supervised = False,
    standby: Standby = False,
) -> None:
    """Data plane: fp32 weights and optimizer state of its slices, on one device."""
    import torch

    from adashard_server.app.allocator import keep_freed_memory
    from adashard_server.app.shard import ShardProcess
    from adashard_server.telemetry import logs

    torch.set_num_threads(1)  # parallel over streams; see docs/decisions
    logs.configure(log_level)
    keep_freed_memory()
    if standby and not _activated():
        return
    process = ShardProcess(
        ShardSettings(
            coordinator=coordinator,
            bind=bind,
            advertise=advertise,
            port=port,
            device=device,
            token=token,
            checkpoint_dir=checkpoint_dir,
        )
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if supervised:
        _when_abandoned(stop.set)
    process.start()
    _ready({"id": process.id, "address": process.address})
    while not stop.wait(0.2) and process.ended is None:
        pass
    process.stop()
    if process.ended is not None:
        raise process.ended


@app.command()
def up(
    shards: Annotated[int, typer.Option(min=1, help="How many shards.")] = 1,
    port: Port = GRPC_PORT,
    http_port: HttpPort = HTTP_PORT,
    registry: Registry = "memory",
    checkpoint_dir: CheckpointDir = "",
    checkpoint_every: CheckpointEvery = 0,
    keep_last: KeepLast = CheckpointSettings().keep_last,
    keep_best: KeepBest = CheckpointSettings().keep_best,
    resume: Resume = "",
) -> None:
    """A coordinator and shards on this machine, until Ctrl-C."""
    from adashard_server.cluster_local import LocalCluster

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    cluster = LocalCluster(
        shards,
        registry=registry,
        port=port,
        http_port=http_port,
        quiet=False,
        checkpoint_dir=checkpoint_dir,
        checkpoints=CheckpointSettings(
            every_steps=checkpoint_every, keep_last=keep_last, keep_best=keep_best
        ),
        resume=resume,
    )
    with cluster:
        typer.echo(f"adashard is up: {shards} shards; Ctrl-C ends it")
        typer.echo(
            f"  workers   address={cluster.address!r}, or ADASHARD_ADDRESS={cluster.address}"
        )
        typer.echo(f"  page      {cluster.url}")
        while not stop.wait(0.2):
            if cluster.failure is not None:
                raise cluster.failure


@app.command()
def demo(
    victims: Annotated[
        list[Victim] | None,
        typer.Argument(metavar="victim", help="Whom --chaos kills: both, if left out."),
    ] = None,
    chaos: Annotated[bool, typer.Option("--chaos", help="Kill processes while it trains.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps to train.")] = 600,
    workers: Annotated[int, typer.Option(min=1, max=8, help="Worker processes.")] = 2,
    shards: Annotated[int, typer.Option(min=1, max=8, help="Shard processes.")] = 2,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
) -> None:
    """Train a small language model on Python's own sources, through a cluster on this machine."""
    from adashard_server.demo.run import run_demo

    dying = _victims(chaos, victims or [])
    if Victim.WORKER in dying and workers < 2:
        raise typer.BadParameter("a worker can be killed where --workers is 2 or more")
    raise typer.Exit(
        run_demo(steps=steps, workers=workers, shards=shards, seed=seed, victims=dying)
    )


def _victims(chaos: bool, named: list[Victim]) -> list[Victim]:
    """Whom the demo kills, in the order of their deaths."""
    if named and not chaos:
        raise typer.BadParameter(f"a {named[0]} is killed with --chaos only")
    if len(set(named)) < len(named):
        raise typer.BadParameter("--chaos kills one shard, one worker, or one of each")
    return (named or list(Victim)) if chaos else []


@app.command()
def status(
    url: Url = f"http://127.0.0.1:{HTTP_PORT}",
    format: Annotated[str, typer.Option(help="default or json.")] = "default",
) -> None:
    """What a cluster does: shards, workers, jobs."""
    from adashard_server import status as page

    found = page.fetch(url)
    typer.echo(json.dumps(found, indent=2) if format == "json" else page.describe(found))


@app.command()
def health(
    port: Port = GRPC_PORT,
    host: Annotated[str, typer.Option(help="Where to ask.")] = "127.0.0.1",
) -> None:
    """Exit code 0 if the process on a gRPC port says that it serves."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
        except grpc.RpcError as error:
            raise CannotReachServer(f"{host}:{port} does not answer: {error.code().name}") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """The version of this installation."""
    typer.echo(VERSION)


def main() -> None:
    """Runs the command; errors of the catalogue are printed, not traced."""
    try:
        app()
    except AdashardError as error:
        if "--supervised" in sys.argv:
            info = error.info()
            said: dict[str, Any] = {"reason": info.reason, "message": info.message}
            said |= {"remedy": info.remedy, "metadata": dict(info.metadata)}
            _ready({"error": said})
        typer.echo(f"{error.reason}: {error}", err=True)
        sys.exit(1)


def _ready(said: dict[str, Any]) -> None:
    """One line on standard output, for whoever started this process."""
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def _activated() -> bool:
    """Does what a shard can do before it is one, and waits to become one; False at the end."""
    from adashard_server.optim.compilation import compile_ahead

    compile_ahead()
    return bool(os.read(0, 1))


def _when_abandoned(end: Callable[[], object]) -> None:
    """Calls `end` when standard input ends, which is when the parent does."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        end()

    threading.Thread(target=watch, name="adashard-parent", daemon=True).start()


if __name__ == "__main__":
    main()
