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
from adashard_server.config import GRPC_PORT, HTTP_PORT, CoordinatorSettings, ShardSettings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adashard: an optimizer as a service for PyTorch.",
)
serve = typer.Typer(no_args_is_help=True, help="Run one process of a cluster.")
app.add_typer(serve, name="serve")

TAKEN_OVER = 3

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
Token = Annotated[str, typer.Option(envvar="ADASHARD_TOKEN", help="The cluster's secret.")]
LogLevel = Annotated[str, typer.Option(envvar="ADASHARD_LOG_LEVEL", help="DEBUG to ERROR.")]
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
    token: Token = "",
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
        token=token,
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
    log_level: LogLevel = "INFO",
    supervised: Supervised = False,
) -> None:
    """Data plane: fp32 weights and optimizer state of its slices, on one device."""
    import torch

    from adashard_server.app.shard import ShardProcess
    from adashard_server.telemetry import logs

    torch.set_num_threads(1)  # parallel over streams; see docs/decisions
    logs.configure(log_level)
    process = ShardProcess(
        ShardSettings(
            coordinator=coordinator,
            bind=bind,
            advertise=advertise,
            port=port,
            device=device,
            token=token,
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
) -> None:
    """A coordinator and shards on this machine, until Ctrl-C."""
    from adashard_server.cluster_local import LocalCluster

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    cluster = LocalCluster(shards, registry=registry, port=port, http_port=http_port, quiet=False)
    with cluster:
        typer.echo(f"adashard is up: {shards} shards; Ctrl-C ends it")
        typer.echo(
            f"  workers   address={cluster.address!r}, or ADASHARD_ADDRESS={cluster.address}"
        )
        typer.echo(f"  page      {cluster.url}")
        while not stop.wait(0.2):
            ended = [one for one in cluster.processes if one.exit_code is not None]
            if ended:
                typer.echo(
                    f"{ended[0].role} ended by itself (exit code {ended[0].exit_code})", err=True
                )
                raise typer.Exit(1)


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Steps to train.")] = 600,
    workers: Annotated[int, typer.Option(min=1, max=8, help="Worker processes.")] = 2,
    shards: Annotated[int, typer.Option(min=1, max=8, help="Shard processes.")] = 2,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
) -> None:
    """Train a small language model on Python's own sources, through a cluster on this machine."""
    from adashard_server.demo.run import run_demo

    raise typer.Exit(run_demo(steps=steps, workers=workers, shards=shards, seed=seed))


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


def _when_abandoned(end: Callable[[], object]) -> None:
    """Calls `end` when standard input ends, which is when the parent does."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        end()

    threading.Thread(target=watch, name="adashard-parent", daemon=True).start()


if __name__ == "__main__":
    main()
