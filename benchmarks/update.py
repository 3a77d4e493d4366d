"""The update on one thread: over the traffic that nothing can avoid, and over torch's.

    whole       both passes over a parameter in one slice, over one read of G and X -= c G in
                place; and torch.optim.Adafactor(foreach=True) over both passes
    column cut  a shard's work on all slices of a parameter that is cut into columns, over the
                same traffic
    small       torch.optim.Adafactor(foreach=True) over a shard's work on 2,000 small parameters
    error       the largest element's distance from float64 after 20 steps, over the RMS of the
                change

Times are of the thread's processor, in nanoseconds per element; what is compared is taken in turns.
The floor is the faster of torch and numba, for the read and for the update each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from machine import provenance
from one_thread import OneThread
from peers.optimizers import SETTINGS, OurKernel, TorchForeach, axes_of
from targets import Target, print_targets, target, write_json
from torch import Tensor
from turns import in_turns, ratio

from adashard import schedule
from adashard_server.optim import adafactor

SHAPES: dict[tuple[int, int], float] = {
    (768, 3072): 1.3,
    (3072, 768): 1.3,
    (50257, 768): 1.3,
    (4096, 4096): 1.4,
}
"""What both passes may take, over the floor."""
COLUMN_CUT = (1024, 65536)
SMALL, SMALL_COUNT = (64, 48), 2000
SLICE_BYTES = 4 << 20
STEPS = 20
TINY = 1e-9
_LANES = 64

Work = Callable[[], object]


# --- the floor -----------------------------------------------------------------------------------


@numba.njit(nogil=True, error_model="numpy")
def read(flat: np.ndarray) -> float:
    """The sum, in as many lanes as let the compiler use all of its registers."""
    lanes = np.zeros(_LANES, np.float32)
    for block in range(flat.size // _LANES):
        piece = flat[block * _LANES : (block + 1) * _LANES]
        for lane in range(_LANES):
            lanes[lane] += piece[lane]
    return lanes.sum() + flat[flat.size // _LANES * _LANES :].sum()


@numba.njit(nogil=True, error_model="numpy")
def subtract(target: np.ndarray, flat: np.ndarray, factor: np.float32) -> None:
    """X -= c G."""
    for at in range(flat.size):
        target[at] -= factor * flat[at]


def floor(gradient: Tensor, weight: Tensor) -> dict[str, Work]:
    """Ways to read G once and to subtract from X in place, all flat."""
    g, x, factor = gradient.numpy(), weight.numpy(), np.float32(TINY)
    return {
        "read_torch": lambda: torch.sum(gradient),
        "read_numba": lambda: read(g),
        "subtract_torch": lambda: weight.sub_(gradient, alpha=TINY),
        "subtract_numba": lambda: subtract(x, g, factor),
    }


def floor_s(spent: dict[str, list[float]]) -> list[float]:
    """Seconds of the floor, round by round: the faster way of each half."""
    halves = [
        min((spent[f"{half}_{by}"] for by in ("torch", "numba")), key=statistics.median)
        for half in ("read", "subtract")
    ]
    return [sum(both) for both in zip(*halves, strict=True)]


# --- what is measured ----------------------------------------------------------------------------


def measure_whole(shape: tuple[int, int], rounds: int) -> dict[str, float]:
    """A parameter in one slice: ours, torch's and the floor."""
    gradient, weight = _normal(shape), _normal(shape)
    ours, torchs = OurKernel([weight]), TorchForeach([weight.clone()])
    works: dict[str, Work] = {
        "ours": lambda: ours.step([gradient]),
        "torch": lambda: torchs.step([gradient]),
        **floor(gradient.view(-1), weight.view(-1)),
    }
    return _summary(_timed(works, rounds), weight.numel())


def measure_column_cut(rounds: int) -> dict[str, float]:
    """All slices of a parameter that is cut into columns, as a shard takes them."""
    job = OneThread([COLUMN_CUT], SLICE_BYTES)
    gradient, weight = _normal(COLUMN_CUT).view(-1), _normal(COLUMN_CUT).view(-1)
    spent = in_turns({"ours": lambda: job.step_s(1), **_clocked(floor(gradient, weight))}, rounds)
    return {"slices": job.slice_count, **_summary(spent, weight.numel())}


def measure_small(rounds: int) -> dict[str, float]:
    """Many small parameters: a shard's work against torch's."""
    shapes = [SMALL] * SMALL_COUNT
    job, torchs = OneThread(shapes, SLICE_BYTES), TorchForeach([_normal(one) for one in shapes])
    gradients = [_normal(one) for one in shapes]
    works = {"ours": _ours(job), **_clocked({"torch": lambda: torchs.step(gradients)})}
    return _summary(in_turns(works, rounds), SMALL_COUNT * SMALL[0] * SMALL[1])


def measure_error(shape: tuple[int, int]) -> float:
    """The largest distance from float64 after `STEPS` steps, over the RMS of the change."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(shape[0], 1, generator=generator).exp()
    begin = torch.randn(shape, generator=generator)
    single, double = begin.clone(), begin.double()
    ours, axes = OurKernel([single]), axes_of(shape)
    state = adafactor.new_state(shape, axes, momentum=False, dtype=torch.float64)
    for count in range(1, STEPS + 1):
        gradient = torch.randn(shape, generator=generator).mul_(scales)
        ours.step([gradient])
        adafactor.step(
            double,
            gradient.double(),
            state,
            axes,
            SETTINGS,
            beta2=schedule.beta2(count, -0.8),
            rho=schedule.rho(count, lr=None, relative_step=True, warmup_init=False),
        )
    change = float((double - begin).square_().mean().sqrt())
    return float((double - single).abs_().max()) / change


def _normal(shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(sum(shape)))


def _ours(job: OneThread) -> Callable[[], float]:
    """A shard's step of all slices, timed as `_seconds` does."""

    def step_s() -> float:
        job.step_s(1)
        return job.step_s(1)

    return step_s


def _clocked(works: dict[str, Work]) -> dict[str, Callable[[], float]]:
    return {name: lambda work=work: _seconds(work) for name, work in works.items()}


def _timed(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    return in_turns(_clocked(works), rounds)


def _seconds(work: Work) -> float:
    """Processor seconds of this thread, which neighbours disturb less than those of the wall.

    Every work is done twice and timed once, so that it finds the caches as it has left them itself:
    small matrices fit into them, and torch's temporaries would drive them out for its neighbour.
    """
    work()
    began = time.thread_time()
    work()
    return time.thread_time() - began


def _summary(spent: dict[str, list[float]], elements: int) -> dict[str, float]:
    """Medians in ns per element, and medians of the rounds' ratios."""
    found = {f"{name}_ns": _ns(seconds, elements) for name, seconds in spent.items()}
    if "torch" in spent:
        found["torch_over_ours"] = ratio(spent["torch"], spent["ours"])
    if "read_torch" in spent:
        least = floor_s(spent)
        found["floor_ns"] = _ns(least, elements)
        found["over_floor"] = ratio(spent["ours"], least)
    return found


def _ns(seconds: Sequence[float], elements: int) -> float:
    return statistics.median(seconds) / elements * 1e9


# --- the report ----------------------------------------------------------------------------------


def measure(rounds: int, quick: bool) -> tuple[dict[str, Any], list[Target]]:
    """All of it: numbers and targets."""
    found: dict[str, Any] = {"whole": {}, "error": {}}
    targets: list[Target] = []
    for shape, asked in SHAPES.items():
        name = _name(shape)
        one = found["whole"][name] = measure_whole(shape, rounds)
        targets.append(target(f"update / floor, {name}", asked, one["over_floor"], "lower"))
        targets.append(
            target(f"torch foreach / update, {name}", 12.0, one["torch_over_ours"], "higher")
        )
    cut = found["column_cut"] = measure_column_cut(rounds)
    name = f"update / floor, {_name(COLUMN_CUT)} in {cut['slices']} slices of columns"
    targets.append(target(name, 1.6, cut["over_floor"], "lower"))
    small = found["small"] = measure_small(rounds)
    name = f"torch foreach / update, {SMALL_COUNT} of {_name(SMALL)}"
    targets.append(target(name, 5.0, small["torch_over_ours"], "higher"))
    for shape in list(SHAPES)[: 2 if quick else None]:
        error = found["error"][_name(shape)] = measure_error(shape)
        name = f"largest error / RMS of the change, {STEPS} steps, {_name(shape)}"
        targets.append(target(name, 6e-5, error, "lower"))
    return found, targets


def _name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="3 rounds; errors of two shapes only")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if arguments.quick else arguments.rounds
    found, targets = measure(rounds, arguments.quick)
    for kind, numbers in found.items():
        print(f"{kind}:", numbers)
    print_targets(targets)
    write_json(arguments.json, {**provenance("benchmarks/update.py"), **found, "targets": targets})


if __name__ == "__main__":
    main()
