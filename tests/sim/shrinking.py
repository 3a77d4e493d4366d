"""The shortest script with which a seed still fails: what goes wrong, and nothing beside it.

References:
    A. Zeller and R. Hildebrandt, Simplifying and Isolating Failure-Inducing Input, IEEE
    Transactions on Software Engineering 28 (2), 2002: delta debugging, of which this is the part
    that leaves out; with a bound on the tries.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.sim.cluster import Cluster
from tests.sim.faults import Script
from tests.sim.history import Violation

TRIES = 150
LINES = 60
LINE_LENGTH = 300


def failure(cluster: Cluster) -> Exception | None:
    """Runs a cluster to its end; what it has broken, if anything.

    What the project's own code raises in a run is a defect just as a broken promise is.
    """
    try:
        cluster.run()
    except Exception as error:
        return error
    return None


def shortest(fails: Callable[[Script], bool], script: Script, tries: int = TRIES) -> Script:
    """A part of `script` of which no further part is known to fail.

    Args:
        fails: whether a run with these faults fails.
        script: one that does.
        tries: as many runs at most.
    """
    size = max(1, len(script) // 2)
    while script and tries > 0:
        start, found = 0, False
        while start < len(script) and tries > 0:
            shorter = script[:start] + script[start + size :]
            tries -= 1
            if fails(shorter):
                script, found = shorter, True
            else:
                start += size
        if size == 1 and not found:
            break
        size = max(1, size // 2)
    return script


def story(seed: int, family: str | None = None) -> str:
    """What a failing seed is about: its shortest script, and the last lines of what happened."""
    first = Cluster(seed, family=family)
    error = failure(first)
    assert error is not None

    def fails(script: Script) -> bool:
        again = failure(Cluster(seed, family=family, script=script))
        return type(again) is type(error)

    script = tuple(first.faults.done)
    repeats = fails(script)
    script = shortest(fails, script) if repeats else script
    last = Cluster(seed, family=family, script=script if repeats else None, traced=True)
    told = failure(last) or error
    lines = [line[:LINE_LENGTH] for line in (last.lines or [])[-LINES:]]
    head = f"seed {seed} of family {last.family!r}, with {len(script)} faults:"
    return "\n".join([head, *map(str, script), *lines, f"{type(told).__name__}: {told}"])


def run(seed: int, family: str | None = None) -> Cluster:
    """One seed.

    Raises:
        Violation: a promise is broken, with the story of it.
    """
    cluster = Cluster(seed, family=family)
    error = failure(cluster)
    if error is not None:
        violation = error if isinstance(error, Violation) else Violation(repr(error))
        violation.add_note(story(seed, family))
        raise violation
    return cluster
