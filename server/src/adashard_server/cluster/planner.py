"""Which shard holds which slice: a pure function of sizes, shards and what was before.

Largest first onto the least loaded (Graham's LPT rule): the fullest shard never holds more than
4/3 of what the best placement would give it, and with many slices of one size, as jobs have,
next to nothing more. What stays where it was costs nothing to move, so that comes first.

References:
    R. L. Graham, Bounds on Multiprocessing Timing Anomalies, SIAM J. Appl. Math. 17 (2), 1969.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def place(
    sizes: Sequence[int],
    shards: Sequence[str],
    *,
    previous: Mapping[int, str] | None = None,
) -> tuple[int, ...]:
    """Per slice, the index into `shards` of the shard that is to hold it.

    The same arguments give the same placement, on every machine: ties are broken by the number
    of the slice, then by the order of the shards.

    Args:
        sizes: bytes of each slice.
        shards: ids, each once; more than there are slices is fine.
        previous: ids of the shards that hold slices now, by number of the slice. A slice stays
            where it is if that shard is among `shards`, even where that is not even.

    Raises:
        ValueError: there is no shard to place slices on, or one is named twice.
    """
    if sizes and not shards:
        raise ValueError(f"{len(sizes)} slices cannot be placed on no shard")
    order = {shard: index for index, shard in enumerate(shards)}
    if len(order) != len(shards):
        raise ValueError(f"a shard is named twice: {', '.join(shards)}")
    numbers = range(len(sizes))
    owners = {
        number: order[shard]
        for number, shard in (previous or {}).items()
        if shard in order and number in numbers
    }
    loads = [0] * len(shards)
    for number, owner in owners.items():
        loads[owner] += sizes[number]
    least_loaded_first = [(load, owner) for owner, load in enumerate(loads)]
    heapq.heapify(least_loaded_first)
    for number in sorted(numbers, key=sizes.__getitem__, reverse=True):  # stable, so by number
        if number not in owners:
            load, owner = least_loaded_first[0]
            owners[number] = owner
            heapq.heapreplace(least_loaded_first, (load + sizes[number], owner))
    return tuple(owners[number] for number in numbers)
