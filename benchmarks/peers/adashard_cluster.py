"""Trains the matrices with Adafactor through a coordinator and N shards, processes all of them."""

from __future__ import annotations

import sys

import httpx
import torch

import adashard
from adashard_server import LocalCluster
from peers.matrices import Matrix, Training, load_trainings, parser, save_weights

SLICE_BYTES = 16 << 10  # cuts a matrix of 128 KiB into at least eight slices


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with LocalCluster(shards=arguments.servers, slice_bytes=SLICE_BYTES) as cluster:
        weights = {
            name: train(cluster, name, training)
            for name, training in load_trainings(arguments.trainings).items()
        }
    save_weights(arguments.weights, weights)


def train(cluster: LocalCluster, job: str, training: Training) -> Matrix:
    """The matrix after all steps of a job of its own."""
    matrix = torch.nn.Parameter(torch.from_numpy(training.weights.copy()))
    with adashard.Adafactor([("matrix", matrix)], address=cluster.address, job=job) as optimizer:
        for gradient in training.gradients:
            matrix.grad = torch.from_numpy(gradient.copy())
            optimizer.step()
        check_cut(cluster, job)
    return matrix.detach().numpy()


def check_cut(cluster: LocalCluster, job: str) -> None:
    """Makes sure that equal bits are no feat of a matrix that lies on one shard, whole."""
    statistics = httpx.get(f"{cluster.url}/api/v1/jobs/{job}", trust_env=False).json()
    slices, shards = statistics["slice_count"], statistics["shard_count"]
    if slices == 1 or shards < cluster.shard_count:
        sys.exit(
            "the matrix was not cut as it should be: "
            f"slices: {slices}, shards with one: {shards} of {cluster.shard_count}"
        )


if __name__ == "__main__":
    main()
