"""Which shard holds which slice: a pure function of slices, shards and what was before.

Largest first onto the least loaded (Graham's LPT rule), by whole parameters at first: a subtree of
slices goes to the least loaded shard if that is not above the mean with it, and comes again as its
two halves if it would be. So slices lie in aligned runs, and each run costs one entry in the
reports of a step. A single slice is placed in any case: no shard is above the mean by more than
one. With parameters of one slice this is Graham's rule, and the fullest shard holds at most 4/3 of
what the best placement would give it.

The fullest shard over the mean, and the runs that the parameters come to, at slices of 4 MiB:

    shards                                2       4       8      16
    GPT-2 small, 148 parameters      1.0000  1.0048  1.0238  1.0374
                                        148     149     151     159
    T5-11B, 509 parameters           1.0000  1.0000  1.0000  1.0000
                                        509     520     529     538

What stays where it was costs nothing to move, so that comes before balance.

References:
    R. L. Graham, Bounds on Multiprocessing Timing Anomalies, SIAM J. Appl. Math. 17 (2), 1969.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import accumulate

from adashard.wire.placement import Slice, nodes


def place(
    slices: Sequence[Slice],
    shards: Sequence[str],
    *,
    previous: Mapping[int, str] | None = None,
) -> tuple[int, ...]:
    """Per slice, the index into `shards` of the shard that is to hold it.

    The same arguments give the same placement, on every machine: ties are broken by the number
    of the slice, then by the order of the shards.

    Args:
        slices: all of the job, as from `cut`.
        shards: ids, each once; more than there are slices is fine.
        previous: ids of the shards that hold slices now, by number of the slice. A slice stays
            where it is if that shard is among `shards`, even where that is not even.

    Raises:
        ValueError: there is no shard to place slices on, or one is named twice.
    """
    if slices and not shards:
        raise ValueError(f"{len(slices)} slices cannot be placed on no shard")
    order = {shard: index for index, shard in enumerate(shards)}
    if len(order) != len(shards):
        raise ValueError(f"a shard is named twice: {', '.join(shards)}")
    owners = {
        number: order[shard]
        for number, shard in (previous or {}).items()
        if shard in order and number < len(slices)
    }
    _place_others(slices, owners, len(shards))
    placement = tuple(owners[number] for number in range(len(slices)))
    check_placement(placement, slice_count=len(slices), shard_count=len(shards))
    return placement


def check_placement(placement: Sequence[int], *, slice_count: int, shard_count: int) -> None:
    """Checks that a placement gives every slice to one shard that exists.

    Args:
        placement: per slice, the index of its shard.
        slice_count: how many slices the job has.
        shard_count: how many shards there are to hold them.

    Raises:
        ValueError: it does not, with the first slice that is amiss.
    """
    if len(placement) != slice_count:
        raise ValueError(f"a placement of {len(placement)} slices for a job of {slice_count}")
    for number, owner in enumerate(placement):
        if not 0 <= owner < shard_count:
            raise ValueError(f"slice {number} is placed on shard {owner} of {shard_count}")


def _place_others(slices: Sequence[Slice], owners: dict[int, int], shard_count: int) -> None:
    """Gives slices that have no owner theirs, in `owners`."""
    bytes_before = [0, *accumulate(piece.byte_count for piece in slices)]
    loads = [0] * shard_count
    for number, owner in owners.items():
        loads[owner] += slices[number].byte_count
    least_loaded_first = [(load, owner) for owner, load in enumerate(loads)]
    heapq.heapify(least_loaded_first)

    def ranked(first: int, count: int) -> tuple[int, int, int]:
        return bytes_before[first] - bytes_before[first + count], first, count

    free = (number for number in range(len(slices)) if number not in owners)
    largest_first = [ranked(node.slice, node.count) for node in nodes(slices, free)]
    heapq.heapify(largest_first)
    while largest_first:
        negative_bytes, first, count = heapq.heappop(largest_first)
        load, owner = least_loaded_first[0]
        load -= negative_bytes
        if count > 1 and load * shard_count > bytes_before[-1]:
            half = count // 2
            heapq.heappush(largest_first, ranked(first, half))
            heapq.heappush(largest_first, ranked(first + half, half))
        else:
            heapq.heapreplace(least_loaded_first, (load, owner))
            owners.update(dict.fromkeys(range(first, first + count), owner))
