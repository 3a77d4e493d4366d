"""Trains the matrices through MXNet's KVStore, kind dist_sync, its optimizer on the servers.

A scheduler, N servers and one worker are processes of their own. A process takes its role from the
environment when it imports mxnet; scheduler and servers then never return from the import.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from peers.matrices import Matrix, Training, load_trainings, parser, save_weights

if TYPE_CHECKING:
    import mxnet as mx

LEARNING_RATE, WEIGHT_DECAY = 0.01, 0.1
WORKER_LIMIT_S = 120.0
CUT_FROM_ELEMENTS = 1000  # larger arrays lie on all servers, in equal pieces of the flat array


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--optimizer", required=True, help="MXNet's name of it, as lamb")
    arguments.add_argument("--role", choices=["launcher", "worker"], default="launcher")
    options = arguments.parse_args()
    if options.role == "worker":
        work(options.trainings, options.weights, options.optimizer)
    else:
        sys.exit(launch(options.servers))


def launch(servers: int) -> int:
    """Runs this command as the worker, with servers around it; its exit code."""
    worker = [sys.executable, "-m", "peers.mxnet_kvstore", *sys.argv[1:], "--role", "worker"]
    with scheduler_and_servers(servers) as variables:
        return subprocess.run(
            worker,
            env={**variables, "DMLC_ROLE": "worker"},
            check=False,
            timeout=WORKER_LIMIT_S,
        ).returncode


@contextmanager
def scheduler_and_servers(count: int) -> Iterator[Mapping[str, str]]:
    """Runs a scheduler and so many servers; gives the environment that finds them."""
    variables = {
        **os.environ,
        "DMLC_PS_ROOT_URI": "127.0.0.1",
        "DMLC_PS_ROOT_PORT": str(free_port()),
        "DMLC_INTERFACE": "lo",
        "DMLC_NODE_HOST": "127.0.0.1",
        "DMLC_NUM_SERVER": str(count),
        "DMLC_NUM_WORKER": "1",
        "MXNET_KVSTORE_BIGARRAY_BOUND": str(CUT_FROM_ELEMENTS),
    }
    command = [sys.executable, "-c", "import mxnet"]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for role in ("scheduler", *["server"] * count):
            processes.append(subprocess.Popen(command, env={**variables, "DMLC_ROLE": role}))
        yield variables
    finally:
        # They end by themselves after a worker that ended well, and never after another.
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def work(trainings: Path, weights: Path, optimizer: str) -> None:
    """Trains all matrices as the one worker, each under a key of its own."""
    import mxnet as mx  # not above: the launcher must not take a role

    store = mx.kv.create("dist_sync")
    store.set_optimizer(
        mx.optimizer.create(optimizer, learning_rate=LEARNING_RATE, wd=WEIGHT_DECAY)
    )
    by_name = load_trainings(trainings).items()
    save_weights(weights, {name: train(store, key, one) for key, (name, one) in enumerate(by_name)})


def train(store: mx.kv.KVStore, key: int, training: Training) -> Matrix:
    """The matrix after all steps."""
    import mxnet as mx

    store.init(key, mx.nd.array(training.weights))
    fresh = mx.nd.zeros(training.weights.shape)
    for gradient in training.gradients:
        store.push(key, mx.nd.array(gradient))
        store.pull(key, out=fresh)
        fresh.wait_to_read()
    return fresh.asnumpy()


if __name__ == "__main__":
    main()
