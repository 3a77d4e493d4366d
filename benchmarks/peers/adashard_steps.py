"""adashard as its users run it: a coordinator, one shard and workers, over gRPC on the loopback."""

from __future__ import annotations

from shapes import GPT2_SMALL
from workers import Crew

from adashard_server import LocalCluster
from peers.gpt2 import WARM_UP, WORKERS, Steps, options, phase, save


def main() -> None:
    """Measures every phase; there is one optimizer, our own."""
    arguments = options(__doc__)
    steps = Steps()
    with LocalCluster(shards=1, restart=False) as cluster, Crew(max(WORKERS)) as crew:
        for workers in WORKERS:
            crew.do(workers, "join", GPT2_SMALL, cluster.address, f"job-{workers}", workers)
            spent = crew.steps_s(workers, WARM_UP + arguments.steps)
            steps[phase(workers, "ours")] = spent[WARM_UP:]
            crew.do(workers, "leave")
    save(arguments.results, steps)


if __name__ == "__main__":
    main()
