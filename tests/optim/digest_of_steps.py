"""A program that prints one SHA-256 over 20 steps of 15 parameters in compiled slices.

`test_instruction_sets.py` runs it with code for several instruction sets.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys

import llvmlite.binding
import torch
from tests.optim.slices import PAPER, CutParameter, drawn, held_by

from adashard_server.optim.compiled import CompiledPasses
from adashard_server.optim.factored import Axes
from adashard_server.optim.rounding import rounded

STEPS = 20
EVERYTHING = dataclasses.replace(PAPER, beta1=0.9, weight_decay=0.01, clip_threshold=0.7)
CLAMPED = dataclasses.replace(PAPER, eps1=0.3, clamp_eps=True)
ROWS, COLUMNS = Axes(0, 1), Axes(1, 0)

# (shape, factored axes, cut axis, slices, settings)
PARAMETERS = [
    ((33, 70), ROWS, 0, 8, PAPER),  # rows
    ((33, 70), ROWS, 1, 8, PAPER),  # columns
    ((70, 33), COLUMNS, 0, 4, EVERYTHING),  # columns of a matrix that is turned
    ((131, 129), ROWS, 0, 2, EVERYTHING),
    ((131, 129), ROWS, 1, 2, CLAMPED),
    ((67, 65), ROWS, 0, 4, CLAMPED),
    ((3, 5003), ROWS, 1, 4, EVERYTHING),  # rows longer than a run
    ((2, 9001), ROWS, 0, 1, PAPER),
    ((1, 257), ROWS, 1, 2, PAPER),  # one row
    ((257, 1), ROWS, 0, 2, PAPER),  # one column
    ((5, 3, 17, 19), Axes(2, 3), 0, 4, EVERYTHING),  # whole matrices
    ((3, 17, 3, 19), Axes(1, 3), 3, 2, CLAMPED),  # axes apart, a part of each matrix
    ((5001,), None, 0, 4, EVERYTHING),
    ((37, 41), None, 1, 2, CLAMPED),
    ((), None, 0, 1, PAPER),
]


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:  # makes the compiler take so many numbers at a time
        llvmlite.binding.set_option("digest", f"-force-vector-width={int(sys.argv[1])}")
        # A stated width would also be leave to add in another order.
        llvmlite.binding.set_option("digest", "-hints-allow-reordering=false")
    digest = hashlib.sha256()
    for seed, (shape, axes, axis, count, settings) in enumerate(PARAMETERS):
        weight, gradients = drawn(shape, seed, steps=STEPS)
        parameter = CutParameter(
            weight, axes, settings, axis=axis, count=count, passes=CompiledPasses
        )
        for step, gradient in enumerate(gradients, start=1):
            total = torch.empty(gradient.numel())
            for rank in range(3):
                addend = (gradient.view(-1) * (rank + 1)).bfloat16()
                CompiledPasses.accumulate(total, addend, 1 / 3, first=rank == 0)
            measures = parameter.step(
                total.view(shape), beta2=1 - step**-0.5, rho=0.1, scale=1 / (1 + seed)
            )
            # What follows from the partial sums, and nothing else.
            digest.update(repr(measures[0]).encode())
            for tensor in held_by(parameter).values():
                digest.update(tensor.contiguous().numpy().tobytes())
        for dtype in (torch.bfloat16, torch.float16):
            reply = rounded(
                parameter.weight.reshape(-1), dtype, seed=1, slice_index=seed, step=STEPS, first=3
            )
            digest.update(reply.view(torch.int16).numpy().tobytes())
    print(digest.hexdigest())


main()
