"""What slices contribute to the sums over their parameter, added up."""

from __future__ import annotations

import math

import torch

from adashard_server.optim import partials
from adashard_server.optim.partials import Partial


def test_both_parts_together_have_the_sums_of_both_and_the_lesser_least():
    def part(number):
        tensor = torch.full((2, 3), number)
        return Partial(
            weight_squared_sum=number,
            update_squared_sum=10 * number,
            least=-number,
            squares=tensor,
            ratios=2 * tensor,
        )

    total = part(1.0) + part(2.0)
    assert (total.weight_squared_sum, total.update_squared_sum, total.least) == (3.0, 30.0, -2.0)
    assert torch.equal(total.squares, torch.full((2, 3), 3.0))
    assert torch.equal(total.ratios, torch.full((2, 3), 6.0))


def test_parts_without_a_long_factor_are_two_numbers():
    total = partials.alone(1.0, 2.0) + partials.alone(3.0, 4.0)
    assert (total.weight_squared_sum, total.update_squared_sum) == (4.0, 6.0)
    assert total.least == math.inf
    assert total.squares.numel() == total.ratios.numel() == 0
