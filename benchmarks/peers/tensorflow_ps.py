"""Trains the matrices with Adafactor through TensorFlow's ParameterServerStrategy.

One worker and N parameter servers, each a gRPC server of this process. Every matrix is a variable
that `FixedShardsPartitioner` cuts by rows over all N. The optimizer is tf_keras' Adafactor: Keras 3
cannot build an optimizer for such a variable.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tf_keras

from peers.matrices import Matrix, Training, load_trainings, parser, save_weights

LEARNING_RATE = 0.01


def main() -> None:
    arguments = parser(__doc__).parse_args()
    strategy = parameter_servers(arguments.servers)
    coordinator = tf.distribute.experimental.coordinator.ClusterCoordinator(strategy)
    weights = {
        name: train(strategy, coordinator, name, training, arguments.servers)
        for name, training in load_trainings(arguments.trainings).items()
    }
    save_weights(arguments.weights, weights)
    os._exit(0)  # TensorFlow's servers have no way to stop; the process takes them along


def parameter_servers(count: int) -> tf.distribute.experimental.ParameterServerStrategy:
    """Starts a worker and so many parameter servers; the strategy that uses them."""
    cluster = tf.train.ClusterSpec(
        {"worker": [free_address()], "ps": [free_address() for _ in range(count)]}
    )
    threads = tf.compat.v1.ConfigProto(
        inter_op_parallelism_threads=2, intra_op_parallelism_threads=1
    )
    for job in cluster.jobs:
        for index in range(cluster.num_tasks(job)):
            tf.distribute.Server(cluster, job, index, protocol="grpc", config=threads)
    distribute = tf.distribute.experimental
    return distribute.ParameterServerStrategy(
        tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc"),
        variable_partitioner=distribute.partitioners.FixedShardsPartitioner(count),
    )


def free_address() -> str:
    """An address of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def train(
    strategy: tf.distribute.experimental.ParameterServerStrategy,
    coordinator: tf.distribute.experimental.coordinator.ClusterCoordinator,
    name: str,
    training: Training,
    servers: int,
) -> Matrix:
    """The matrix after all steps, each run by the worker."""
    with strategy.scope():
        variable = tf.Variable(training.weights, name=name)
        pieces = pieces_of(variable)  # which know the whole only as long as somebody holds it
        optimizer = tf_keras.optimizers.Adafactor(LEARNING_RATE)
        optimizer.build(pieces)
    assert len(pieces) == servers, f"{name} lies in {len(pieces)} pieces on {servers} servers"

    def apply(gradient: tf.Tensor) -> None:
        # As Keras' own loop does it: the gradient of a sharded variable is that of its pieces.
        parts = tf.split(gradient, len(pieces), axis=0)
        optimizer.apply_gradients(list(zip(parts, pieces, strict=True)))

    @tf.function
    def step(gradient: tf.Tensor) -> None:
        strategy.run(apply, args=(gradient,))

    for gradient in training.gradients:
        coordinator.schedule(step, args=(tf.constant(gradient),))
        coordinator.join()
    return np.concatenate([piece.numpy() for piece in pieces])


def pieces_of(variable: tf.Variable) -> Sequence[tf.Variable]:
    """The variables that a sharded variable consists of; an unsharded one itself."""
    return getattr(variable, "variables", [variable])


if __name__ == "__main__":
    main()
