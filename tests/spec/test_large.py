"""Models of gigabytes pass with flat memory in transport."""

from __future__ import annotations

import pytest
import torch

import adashard
from adashard_server import LocalCluster

ROWS, COLUMNS = 18_432, 32_768  # 2.25 GiB in float32, in one tensor
ALLOWED_BYTES = 160 << 20  # for frames under way and what the allocator keeps, at any size


def peak_bytes(process: int | str) -> int:
    """The most memory that a process has ever held."""
    with open(f"/proc/{process}/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def stepped(cluster, weight, job, **options) -> adashard.Adafactor:
    optimizer = adashard.Adafactor(
        [("weight", weight)], address=cluster.address, job=job, **options
    )
    optimizer.step()
    return optimizer


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tensor_of_more_than_two_gibibytes_passes_with_flat_memory_in_transport():
    torch.set_num_threads(1)
    with LocalCluster(1) as cluster:
        shard = cluster.processes["shard-0"].pid
        small = torch.nn.Parameter(torch.ones(4, 4))
        small.grad = torch.ones(4, 4)
        stepped(cluster, small, "warm-up").close()
        weight = torch.nn.Parameter(torch.full((ROWS, COLUMNS), 0.5))
        weight.grad = torch.full((ROWS, COLUMNS), 0.25)
        weight.grad[0, 0] = float("nan")
        model = weight.numel() * weight.element_size()
        ours, theirs = peak_bytes("self"), peak_bytes(shard)

        # A skipped step moves everything and updates nothing: what is left is transport.
        optimizer = stepped(cluster, weight, "large", nonfinite="skip")
        in_transport = peak_bytes(shard) - theirs - 2 * model  # masters and one sum
        weight.grad[0, 0] = 0.25
        optimizer.step()
        in_worker = peak_bytes("self") - ours
        assert optimizer.global_step == 2
        optimizer.close()

        # At the first update U = G / sqrt(V) is one: the step is rho times the weights' RMS.
        assert torch.allclose(weight.detach()[::999, ::999], torch.tensor(0.495), atol=1e-4)
        in_update = peak_bytes(shard) - theirs - 2 * model
        print(
            f"model {model >> 20} MiB; over it: worker {in_worker >> 20} MiB, shard "
            f"{in_transport >> 20} MiB in transport, {in_update >> 20} MiB with the readable update"
        )
        assert in_transport <= ALLOWED_BYTES
        assert in_worker <= ALLOWED_BYTES
