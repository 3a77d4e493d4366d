"""Steps in a row with gradients that are not finite: told of once, and too many are the end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cluster.scenes import announced, told
from tests.cluster.test_coordinator import Bench

from adashard.wire.control import Bye, StepSummary
from adashard.wire.errors import Evicted, from_info
from adashard_server.cluster.instructions import Announce
from adashard_server.cluster.strikes import Strikes, Verdict

WORKERS = "abc"


def of(step: int, *workers: str, parameters: tuple[str, ...] = ("p0",)) -> StepSummary:
    """What a shard says of a step: whose gradients were not finite, if anybody's."""
    return StepSummary(
        job="job",
        step=step,
        skipped=bool(workers or parameters),
        not_finite_workers=workers,
        not_finite_parameters=parameters,
    )


def clean(step: int) -> StepSummary:
    return of(step, parameters=())


@given(
    st.lists(st.sets(st.sampled_from(WORKERS)), max_size=12),
    st.integers(1, 3),
    st.integers(0, 4),
    st.data(),
)
def test_a_worker_is_out_when_its_streak_reaches_the_limit_and_told_of_when_one_begins(
    steps, shards, limit, data
):
    """Whatever shard tells first, and although all of them tell."""
    strikes = Strikes(limit)
    lengths = dict.fromkeys(WORKERS, 0)
    for step, poisoned in enumerate(steps, start=1):
        told, out = [], set()
        for _ in range(shards):
            verdict = strikes.take(of(step, *sorted(poisoned), parameters=()), lineage=1)
            told += [name for event in verdict.told for name in event.facts["workers"].split(", ")]
            out |= verdict.out.keys()
        lengths = {one: lengths[one] + 1 if one in poisoned else 0 for one in WORKERS}
        assert told == [one for one in WORKERS if lengths[one] == 1]
        assert out == {one for one in WORKERS if limit and lengths[one] >= limit}
        late = data.draw(st.integers(1, step))
        again = of(late, *sorted(poisoned), parameters=())
        assert strikes.take(again, lineage=1) == Verdict()


def test_what_is_told_names_step_workers_and_parameters():
    (event,) = Strikes().take(of(7, "a", "b", parameters=("x", "y")), lineage=1).told
    assert event == Announce(
        "job",
        "not_finite",
        "step 7 is skipped: NaN or Inf in the gradients of worker a, b, at 'x', 'y'",
        {"step": "7", "workers": "a, b", "parameters": "'x', 'y'"},
    )


def test_a_sum_that_is_not_finite_is_told_of_and_nobody_s_fault():
    strikes = Strikes(1)
    told = [strikes.take(of(step), lineage=1) for step in (1, 2, 4)]
    assert [len(verdict.told) for verdict in told] == [1, 0, 1]
    assert "in the sum of all workers, at 'p0'" in told[0].told[0].text
    assert all(verdict.out == {} for verdict in told)


def test_a_step_in_order_says_nothing_and_ends_a_streak():
    strikes = Strikes(2)
    assert strikes.take(of(1, "a"), lineage=1).out == {}
    assert strikes.take(clean(2), lineage=1) == Verdict()
    assert strikes.take(of(3, "a"), lineage=1).out == {}
    assert strikes.take(of(4, "a"), lineage=1).out.keys() == {"a"}


def test_steps_of_another_lineage_begin_anew():
    strikes = Strikes(3)
    for step in (8, 9):
        strikes.take(of(step, "a"), lineage=1)
    outs = [strikes.take(of(step, "a"), lineage=2).out.keys() for step in (5, 6, 7)]
    assert outs == [set(), set(), {"a"}]


# --- the coordinator -----------------------------------------------------------------------------


def struck(bench: Bench, steps: range, member: str = "shard-00") -> list:
    says = (bench.says(member, of(step, "worker-1", parameters=("x",))) for step in steps)
    return list(itertools.chain.from_iterable(says))


def test_a_worker_that_goes_on_is_evicted_and_reads_why():
    bench = Bench.opened("worker-0", "worker-1")
    assert announced(struck(bench, range(1, 3))) == ["not_finite"]
    said = struck(bench, range(3, 4))
    assert announced(said) == ["evicted"]
    error = from_info(told(said, Bye)["worker-1"].error)
    assert isinstance(error, Evicted)
    assert "NaN or Inf in the gradients of 3 steps of job 'job' in a row" in error.message
    assert "step 3, at 'x'" in error.message
    assert error.facts == {"worker": "worker-1", "step": "3", "parameters": "'x'"}
    bench.make_generation()
    assert bench.coordinator.jobs["job"].worker_ids() == {"worker-0"}


@pytest.mark.parametrize(("strikes", "evicted"), [(0, False), (1, True), (4, True), (5, False)])
def test_the_limit_is_a_setting(strikes, evicted):
    bench = Bench.opened("worker-0", "worker-1")
    bench.coordinator._strikes = Strikes(strikes)
    assert ("evicted" in announced(struck(bench, range(1, 5)))) == evicted


def test_only_a_shard_is_believed_and_only_of_the_job_s_workers():
    bench = Bench.opened("worker-0", "worker-1")
    assert struck(bench, range(1, 9), member="worker-0") == []
    for step in range(1, 9):
        assert "evicted" not in announced(bench.says("shard-00", of(step, "shard-00", "nobody")))
