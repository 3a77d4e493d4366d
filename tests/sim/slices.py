"""What a shard holds of a job: sums that know what was added, and weights that know their past."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tests.sim.history import Gradient, Step, Sum, Violation, Weights, after, exact, value_of
from tests.sim.truth import Truth

from adashard.wire.messages import Exchange, Outcome, Record
from adashard.wire.placement import Slice
from adashard_server.optim.partials import Partial
from adashard_server.shard.instructions import Add
from adashard_server.shard.partials import Finding, short_count, unpacked
from adashard_server.shard.records import bit

if TYPE_CHECKING:
    from adashard_server.shard.rounds import Rounds


class SimSlices:
    """Stands in for the store of slices: adds, measures and applies, and looks at what it does."""

    def __init__(self, owner: str, truth: Truth) -> None:
        self.weights: dict[int, Weights] = {}
        self._owner, self._truth = owner, truth
        self._sums: dict[int, list[Sum]] = {}

    def add(self, index: int, add: Add, gradient: Gradient) -> None:
        """Elements of one gradient come into a sum, or are the first in it."""
        count = self._truth.slices[index].element_count
        elements = self._sums.setdefault(index, [()] * count)
        if add.first:
            elements[add.start : add.stop] = [(gradient,)] * (add.stop - add.start)
        else:
            for element in range(add.start, add.stop):
                elements[element] = (*elements[element], gradient)

    def measure(self, index: int, exchange: Exchange) -> Finding:
        """Numbers in the place of sums of squares, which tell what they were formed of."""
        total = self._sums[index][0]
        piece = self._truth.slices[index]
        poisoned = any(piece.parameter in one.not_finite for one in total)
        square = float("nan") if poisoned else exact(value_of(total))
        if exchange is Exchange.NORM or not piece.split:
            return Finding(square)
        count = short_count(piece) if exchange is Exchange.PARTIALS else 0
        ones = torch.ones(count)
        partial = Partial(
            weight_squared_sum=exact(self.weights[index].value),
            update_squared_sum=exact(value_of(total)),
            least=1.0,
            squares=ones,
            ratios=ones,
        )
        return Finding(square, partial)

    def apply(self, index: int, rounds: Rounds, *, member: bool) -> None:
        """The slice takes the step that it owes.

        Raises:
            Violation: it is not at the version before, its sum is not what the record says, or
                the record was not formed of the weights that all slices had.
        """
        whole, record, before = rounds.record, rounds.record_for(index), self.weights[index]
        assert whole is not None
        if record.step != before.version + 1:
            raise Violation(f"{self._owner} applies step {record.step} to {before}")
        line = self._truth.then(before.line, Step(whole.step, whole.workers, whole.outcome))
        self._truth.decided(before.line, whole)
        updates = rounds.updates(index)
        expected = self._expected(index, record, before)
        self._check(index, whole, expected, before, updates=updates)
        weights = Weights(line, before.value)
        if updates:
            self._check_sum(index, expected)
            weights = after(before, line, value_of(expected), whole)
        degraded = record.workers != whole.workers
        self._truth.applied(index, weights, degraded=degraded, member=member)
        self.weights[index] = weights

    # --- inside ---------------------------------------------------------------------------------

    def _gradients(self, record: Record, before: Weights) -> list[Gradient]:
        step, lineage = record.step, before.line.lineage
        return [self._truth.gradient(worker, step, lineage) for worker in record.workers]

    def _expected(self, index: int, record: Record, before: Weights) -> Sum:
        """The gradients that make up the slice's sum."""
        parameter = self._truth.slices[index].parameter
        gradients = self._gradients(record, before)
        for gradient in gradients:
            base = self._truth.value(before.line)
            if (gradient.line, gradient.value) != (before.line, base):
                raise Violation(f"{self._owner} adds {gradient} to {before}: other weights")
        return tuple(one for one in gradients if bit(one.present, parameter))

    def _check(
        self, index: int, whole: Record, expected: Sum, before: Weights, *, updates: bool
    ) -> None:
        gradients = self._gradients(whole, before)
        finite = not any(one.poisons for one in gradients)
        if finite != (whole.outcome is Outcome.APPLY):
            raise Violation(f"{self._owner} ends step {whole.step} with {whole.outcome.name}")
        if updates != (finite and bool(expected)):
            raise Violation(f"{self._owner} {'updates' * updates} slice {index}: {expected}")
        piece = self._truth.slices[index]
        if updates and piece.split:
            self._check_partials(piece, whole, gradients, before)

    def _check_sum(self, index: int, expected: Sum) -> None:
        """Every element holds each gradient of the step once, in the record's order."""
        wrong = {element for element in self._sums[index] if element != expected}
        if wrong:
            found = [[(one.worker, one.step) for one in element] for element in wrong]
            raise Violation(f"{self._owner} slice {index}: sums of {found}, not of {expected}")

    def _check_partials(
        self, piece: Slice, whole: Record, gradients: list[Gradient], before: Weights
    ) -> None:
        """The record has the sums over the whole parameter, formed of what all its slices were."""
        found = [partial for partial in whole.partials if partial.slice == piece.first]
        if len(found) != 1 or found[0].count != piece.count:
            raise Violation(f"the record has not one partial of parameter {piece.parameter}")
        total = unpacked(found[0])
        slices = range(piece.first, piece.first + piece.count)
        weights = sum(exact(self._truth.at(before.line, index).value) for index in slices)
        summed = tuple(one for one in gradients if bit(one.present, piece.parameter))
        if total.weight_squared_sum != weights:
            raise Violation(f"the record of step {whole.step} was formed of other weights")
        if total.update_squared_sum != piece.count * exact(value_of(summed)):
            raise Violation(f"the record of step {whole.step} was formed of other gradients")
        if {*total.squares.tolist(), *total.ratios.tolist()} - {float(piece.count)}:
            raise Violation(f"the record of step {whole.step} counts slices wrongly")
