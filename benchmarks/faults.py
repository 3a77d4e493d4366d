"""What becomes of a training whose processes are killed, and whose messages get lost, at any point.

    python benchmarks/faults.py                      # all faults; takes minutes
    python benchmarks/faults.py --only commit        # those with this in their line
    python benchmarks/faults.py --json faults.json

Two workers train through two shards and a coordinator, all of them processes. In every run one
fault is placed, and the weights afterwards are compared with those of an undisturbed run: all bits
are to be the same. Where a worker is killed, they are to be those of a run that it has left after
the last step that it was part of. Ends with 1 if one bit differs, or a step takes 30 s.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from disturbed.cases import Case, all_cases
from disturbed.crew import Failed, Silent
from disturbed.stage import DidNotHappen, Stage
from machine import provenance


@dataclass(frozen=True, slots=True)
class Result:
    """A line of the table."""

    case: str
    result: str
    recovery_s: float | None = None


def play(cases: Iterable[Case]) -> Iterator[Result]:
    """Plays the cases on one stage."""
    with Stage() as stage:
        for case in cases:
            yield _play(stage, case)


def _play(stage: Stage, case: Case) -> Result:
    try:
        outcome = stage.play(case)
    except (Failed, Silent, DidNotHappen) as error:
        return Result(str(case), f"{type(error).__name__}: {error}")
    same = set(outcome.digests.values()) == {stage.expected(case, outcome)}
    return Result(str(case), "same bits" if same else "OTHER BITS", outcome.recovery_s)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases with this text in their line")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args()
    results = []
    for result in play(case for case in all_cases() if arguments.only in str(case)):
        results.append(result)
        seconds = "-" if result.recovery_s is None else f"{result.recovery_s:.2f}"
        print(f"| {result.case} | {result.result} | {seconds} |", flush=True)
    if arguments.json:
        found = {**provenance("benchmarks/faults.py"), "results": [asdict(one) for one in results]}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(any(result.result != "same bits" for result in results))


if __name__ == "__main__":
    main()
