"""What was, whoever still knows it: every line, every slice's weights in it, every gradient.

Whatever a shard applies is compared with this, and after every event that changes a copy so is
all that living members hold (docs/protocol.md, what is promised).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tests.sim.history import Gradient, Line, Step, Violation, Weights

from adashard.wire.messages import Lineage, Record
from adashard.wire.placement import Slice


class Truth:
    """The history of one job, as it is known outside of it."""

    def __init__(self, slices: tuple[Slice, ...]) -> None:
        self.slices = slices
        self.degraded = False  # whether a step was ever finished without one of its workers
        self._weights: dict[tuple[Line, int], Weights] = {}
        self._roots: dict[int, Line] = {}
        self._lines: dict[tuple[Line, Step], Line] = {}
        self._records: dict[tuple[Line, tuple[str, ...]], Record] = {}
        self._values: dict[Line, int] = {}
        self._gradients: dict[tuple[str, int, int], Gradient] = {}

    def clear(self) -> None:
        """A job of the same name has nothing to do with the one that was."""
        self.degraded = False
        for known in (self._weights, self._roots, self._lines, self._records, self._values):
            known.clear()
        self._gradients.clear()

    # --- lines ----------------------------------------------------------------------------------

    def begin(self, lineage: Lineage, values: Iterable[int]) -> list[Weights]:
        """The weights of a lineage's first version; its truth if nobody began it before."""
        number = lineage.number
        if number not in self._roots:
            name = lineage.origin[-3:] or "saved"
            line = Line(
                f"{name}@{lineage.base_version}", number, number, lineage.base_version, None
            )
            self._roots[number] = line
        line = self._roots[number]
        weights = [Weights(line, value) for value in values]
        for index, one in enumerate(weights):
            self._weights.setdefault((line, index), one)
        return weights

    def then(self, line: Line, step: Step) -> Line:
        """The line that a step leads to."""
        key = line, step
        if key not in self._lines:
            workers = ",".join(worker[-3:].lstrip("0") or "0" for worker in step.workers)
            name = f"{line.name if line.before is None else '..'}+{step.step}({workers})"
            number = len(self._lines) + 1_000_000
            self._lines[key] = Line(name, number, line.lineage, step.step, line)
        return self._lines[key]

    def following(self, weights: Weights, index: int, record: Record) -> Weights:
        """What a slice is after the step of a record."""
        step = Step(record.step, record.workers, record.outcome)
        return self.at(self.then(weights.line, step), index)

    def at(self, line: Line, index: int) -> Weights:
        """What a slice is in a line.

        Raises:
            Violation: no slice of this number has ever been there.
        """
        weights = self._weights.get((line, index))
        if weights is None:
            raise Violation(f"slice {index} never was at {line}")
        return weights

    def all_at(self, line: Line) -> list[Weights]:
        return [self.at(line, piece.index) for piece in self.slices]

    def value(self, line: Line) -> int:
        """Of all weights of a line together."""
        if line not in self._values:
            self._values[line] = hash(tuple(weights.value for weights in self.all_at(line)))
        return self._values[line]

    # --- what happens ---------------------------------------------------------------------------

    def pushes(self, gradient: Gradient) -> None:
        """A worker begins to send a gradient (W5): there is one for each of its steps."""
        key = gradient.worker, gradient.step, gradient.line.lineage
        if self._gradients.setdefault(key, gradient) is not gradient:
            raise Violation(f"{gradient.worker} has two gradients for step {gradient.step}")

    def gradient(self, worker: str, step: int, lineage: int) -> Gradient:
        """What the worker has pushed for a step.

        Raises:
            Violation: nothing.
        """
        found = self._gradients.get((worker, step, lineage))
        if found is None:
            raise Violation(f"{worker} never pushed for step {step} of lineage {lineage}")
        return found

    def decided(self, line: Line, record: Record) -> None:
        """A record was formed after `line`: by whomever, of these workers it is the same."""
        known = self._records.setdefault((line, record.workers), record)
        if known != record and not self.degraded:
            raise Violation(f"two records of one step after {line}: {known} and {record}")

    def applied(self, index: int, weights: Weights, *, degraded: bool, member: bool) -> None:
        """A slice has taken a step on some shard; nobody hears of what no member's shard does."""
        key = weights.line, index
        known = self._weights.get(key)
        if known is not None and known != weights:
            if not member:
                return
            if not degraded:
                raise Violation(f"slice {index} takes other bits to {weights.line} than before")
            self._values.pop(weights.line, None)
        self.degraded |= degraded
        self._weights[key] = weights

    # --- what must hold -------------------------------------------------------------------------

    def agree(self, lineage: int, held: Mapping[str, Mapping[int, Weights]]) -> None:
        """All copies of a lineage are of one history; `held` is by member and slice."""
        lines: dict[int, Line] = {}
        for member, copies in held.items():
            for index, weights in copies.items():
                line = weights.line
                if line.lineage != lineage:
                    continue
                if self._weights.get((line, index)) != weights:
                    raise Violation(f"{member} holds {weights} of slice {index}, now other bits")
                if lines.setdefault(line.version, line) is not line:
                    raise Violation(f"{member} holds {line}, and others {lines[line.version]}")
        for version, line in lines.items():
            before = lines.get(version - 1)
            if before is not None and line.before is not before:
                raise Violation(f"{line} does not go on from {before}")
