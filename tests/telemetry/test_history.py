import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adashard.wire.control import Logged, StepSummary
from adashard_server.telemetry import history as limits
from adashard_server.telemetry.history import History
from adashard_server.telemetry.points import StepPoint, merge, thin

FINITE = st.floats(0, 1e6)
COUNTS = st.integers(0, 10**9)
SUMMARIES = st.builds(
    StepSummary,
    job=st.just("a"),
    step=st.just(1),
    phase_s=st.dictionaries(st.sampled_from(["receive", "apply", "reply"]), FINITE),
    duration_s=FINITE,
    gradient_squared_sum=FINITE,
    update_squared_sum=FINITE,
    element_count=COUNTS,
    clip_ratio=st.floats(1, 100),
    lr_requested=FINITE,
    lr_applied=FINITE,
    pushed_bytes=COUNTS,
    pulled_bytes=COUNTS,
    skipped=st.booleans(),
)


def summary(step, job="a", **fields):
    return StepSummary(job=job, step=step, **fields)


def take(history, steps, *, job="a", seconds=1.0, **fields):
    """Complete these steps, one every `seconds`."""
    for step in steps:
        history.add("s", summary(step, job, **fields), shard_count=1, now_s=step * seconds)


def numbers(points):
    return [point.step for point in points]


# --- merging -------------------------------------------------------------------------------------


@given(st.lists(SUMMARIES, min_size=1, max_size=5), st.randoms())
def test_the_order_in_which_shards_tell_does_not_matter(summaries, random):
    told = merge(summaries, time_s=1.0, interval_s=None, values={})
    random.shuffle(summaries)
    assert merge(summaries, time_s=1.0, interval_s=None, values={}) == told


@given(st.lists(SUMMARIES, min_size=1, max_size=5))
def test_a_merged_step_is_as_slow_as_its_slowest_shard_and_as_large_as_all(summaries):
    point = merge(summaries, time_s=1.0, interval_s=0.5, values={"loss": 2.0})
    assert point.duration_s == max(one.duration_s for one in summaries)
    for phase, seconds in point.phase_s.items():
        assert seconds == max(one.phase_s.get(phase, 0.0) for one in summaries)
    assert point.clip_ratio == max(one.clip_ratio for one in summaries)
    assert point.pushed_bytes == sum(one.pushed_bytes for one in summaries)
    assert point.pulled_bytes == sum(one.pulled_bytes for one in summaries)
    assert point.skipped == any(one.skipped for one in summaries)
    assert (point.time_s, point.interval_s, point.loss) == (1.0, 0.5, 2.0)


def test_norms_are_those_of_the_whole_model():
    point = merge(
        [
            summary(1, gradient_squared_sum=9.0, update_squared_sum=2.0, element_count=1),
            summary(1, gradient_squared_sum=16.0, update_squared_sum=6.0, element_count=1),
        ],
        time_s=0.0,
        interval_s=None,
        values={},
    )
    assert point.gradient_norm == 5.0
    assert point.update_rms == 2.0


def test_what_shards_have_found_not_to_be_finite_is_told_once():
    told = [
        summary(1, not_finite_workers=("a",), not_finite_parameters=("x", "z")),
        summary(1, not_finite_workers=("a",), not_finite_parameters=("y", "z")),
        summary(1),
    ]
    point = merge(told, time_s=0.0, interval_s=None, values={})
    assert point.not_finite_workers == ("a",)
    assert point.not_finite_parameters == ("x", "y", "z")


def test_a_step_that_updated_nothing_has_no_update():
    point = merge([summary(1)], time_s=0.0, interval_s=None, values={})
    assert (point.update_rms, point.clip_ratio, point.loss) == (0.0, 1.0, None)


@pytest.mark.parametrize("square", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows(square):
    told = [summary(1, gradient_squared_sum=square, skipped=True)]
    point = merge(told, time_s=0.0, interval_s=None, values={})
    assert not math.isfinite(point.gradient_norm)


# --- thinning ------------------------------------------------------------------------------------

POINTS = st.lists(st.floats(0, 100) | st.just(math.nan), max_size=200).map(
    lambda norms: [StepPoint(step=i, time_s=0.0, gradient_norm=n) for i, n in enumerate(norms)]
)


@given(POINTS, st.integers(1, 60))
def test_thinned_points_are_some_of_the_points_in_order_with_both_ends(points, max_points):
    kept = thin(points, max_points)
    assert len(kept) <= max_points
    assert numbers(kept) == sorted(set(numbers(kept)))
    assert set(numbers(kept)) <= set(numbers(points))
    if points:
        assert kept[-1] is points[-1]
    if points and max_points > 1:
        assert kept[0] is points[0]
    if len(points) <= max_points:
        assert kept == points


@given(st.integers(1, 999), st.integers(3, 100))
def test_a_spike_of_one_step_is_not_thinned_away(spike, max_points):
    points = [
        StepPoint(step=i, time_s=0.0, gradient_norm=50.0 if i == spike else 1.0)
        for i in range(1000)
    ]
    assert spike in numbers(thin(points, max_points))


@given(st.integers(10, 2000), st.integers(10, 200))
def test_thinning_leaves_no_large_gap(count, max_points):
    points = [StepPoint(step=i, time_s=0.0, gradient_norm=float(i % 7)) for i in range(count)]
    kept = numbers(thin(points, max_points))
    largest = max(later - earlier for earlier, later in pairwise(kept))
    assert largest <= 2 * -(-count // ((max_points - 1) // 2))


# --- gathering -----------------------------------------------------------------------------------


def test_a_step_is_shown_when_all_shards_have_told():
    history = History()
    assert history.add("s0", summary(1, pushed_bytes=3), shard_count=2, now_s=5.0) is None
    assert history.steps("a") == []
    point = history.add("s1", summary(1, pushed_bytes=4), shard_count=2, now_s=6.0)
    assert point is not None
    assert history.steps("a") == [point]
    assert history.latest("a") is point
    assert (point.pushed_bytes, point.time_s, point.interval_s) == (7, 6.0, None)


def test_a_shard_that_tells_twice_counts_once():
    history = History()
    history.add("s0", summary(1, pushed_bytes=3), shard_count=2, now_s=5.0)
    assert history.add("s0", summary(1, pushed_bytes=5), shard_count=2, now_s=5.0) is None
    point = history.add("s1", summary(1, pushed_bytes=4), shard_count=2, now_s=6.0)
    assert point.pushed_bytes == 9


def test_the_time_between_two_steps_is_kept():
    history = History()
    take(history, [1, 2, 3], seconds=0.5)
    assert [point.interval_s for point in history.steps("a")] == [None, 0.5, 0.5]


def test_a_clock_that_goes_back_makes_no_negative_time():
    history = History()
    history.add("s", summary(1), shard_count=1, now_s=10.0)
    assert history.add("s", summary(2), shard_count=1, now_s=9.0).interval_s == 0.0


@given(st.permutations([("log", 2.0), ("log", 4.0), ("s0", 0), ("s1", 0)]))
def test_the_loss_of_a_step_is_the_mean_over_workers_whoever_comes_first(order):
    history = History()
    for kind, loss in order:
        if kind == "log":
            history.log(Logged(job="a", step=1, values={"loss": loss}))
        else:
            history.add(kind, summary(1), shard_count=2, now_s=1.0)
    assert history.latest("a").loss == 3.0


def test_a_value_for_a_step_that_is_forgotten_is_dropped():
    history = History()
    take(history, [5, 6])
    before = history.sequence("a")
    history.log(Logged(job="a", step=3, values={"loss": 1.0}))
    assert history.sequence("a") == before
    assert [point.loss for point in history.steps("a")] == [None, None]


def test_a_job_that_went_back_tells_its_steps_anew():
    history = History()
    take(history, range(1, 11))
    for shard in ("s0", "s1"):
        history.add(shard, summary(7, pushed_bytes=1), shard_count=2, now_s=20.0)
    assert numbers(history.steps("a")) == [1, 2, 3, 4, 5, 6, 7]
    assert history.latest("a").pushed_bytes == 2


def test_a_range_of_steps():
    history = History()
    take(history, range(1, 101))
    assert numbers(history.steps("a", first=11, last=20)) == list(range(11, 21))
    assert numbers(history.steps("a", first=99)) == [99, 100]
    assert numbers(history.steps("a", last=2)) == [1, 2]
    assert history.steps("a", first=101) == []
    assert history.steps("nobody") == []


# --- changes -------------------------------------------------------------------------------------


def test_what_changed_since_is_told_and_only_that():
    history = History()
    take(history, [1, 2, 3])
    seen = history.sequence("a")
    assert history.changed("a", seen) == []
    take(history, [4])
    history.log(Logged(job="a", step=2, values={"loss": 1.0}))
    assert numbers(history.changed("a", seen)) == [2, 4]
    assert numbers(history.changed("a", 0)) == [1, 2, 3, 4]


def test_the_sequence_grows_with_every_change_and_never_goes_back():
    history = History()
    seen = [history.sequence("a")]
    take(history, [1])
    seen.append(history.sequence("a"))
    history.log(Logged(job="a", step=1, values={"loss": 1.0}))
    seen.append(history.sequence("a"))
    history.forget("a")
    take(history, [1])
    seen.append(history.sequence("a"))
    assert seen[0] == 0
    assert seen == sorted(set(seen))


# --- rate ----------------------------------------------------------------------------------------


def test_the_rate_of_steps_is_taken_over_the_last_seconds():
    history = History()
    take(history, range(1, 201), seconds=0.5)
    assert history.steps_per_second("a", now_s=100.0) == pytest.approx(2.0)


def test_a_job_that_halts_slows_down_to_nothing():
    history = History()
    take(history, range(1, 201), seconds=0.1)
    rates = [history.steps_per_second("a", now_s=20.0 + wait) for wait in (0, 5, 20, 31)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(10.0)
    assert rates[-1] == 0.0


def test_one_step_makes_no_rate():
    history = History()
    take(history, [1])
    assert history.steps_per_second("a", now_s=1.0) == 0.0
    assert history.steps_per_second("nobody", now_s=1.0) == 0.0


# --- limits --------------------------------------------------------------------------------------


def test_a_long_run_is_kept_from_its_first_step_in_bounded_memory():
    history = History()
    count = 20_000
    take(history, range(1, count + 1))
    steps = numbers(history.steps("a", max_points=10**6))
    assert len(steps) <= limits.RECENT_MAX + limits.OLDER_MAX
    assert steps[0] == 1
    assert steps[-limits.RECENT_MAX :] == list(range(count - limits.RECENT_MAX + 1, count + 1))
    older = steps[: -limits.RECENT_MAX]
    strides = Counter(b - a for a, b in pairwise(older))
    assert len(strides) == 1, "older steps are evenly spaced"


def test_steps_whose_summaries_are_lost_do_not_pile_up():
    history = History()
    for step in range(1, 1000):
        history.add("s0", summary(step), shard_count=2, now_s=float(step))
    history.add("s1", summary(1), shard_count=2, now_s=0.0)
    assert history.steps("a") == [], "the first step was dropped long ago"
    assert history.add("s1", summary(999), shard_count=2, now_s=0.0) is not None


def test_a_worker_cannot_log_without_bound():
    history = History()
    for number in range(100):
        history.log(Logged(job="a", step=1, values={f"value-{number}": 1.0}))
    take(history, [1])
    assert len(history.latest("a").values) == limits.VALUES_MAX


def test_the_job_that_changed_longest_ago_is_forgotten_first():
    history = History()
    for number in range(limits.JOBS_MAX):
        take(history, [1], job=f"job-{number}")
    take(history, [2], job="job-0")
    take(history, [1], job="one more")
    assert len(history.jobs()) == limits.JOBS_MAX
    assert "job-1" not in history.jobs()
    assert {"job-0", "one more"} <= set(history.jobs())


def test_a_job_that_is_forgotten_leaves_nothing():
    history = History()
    take(history, [1])
    history.forget("a")
    history.forget("a")
    assert (history.steps("a"), history.latest("a"), history.jobs()) == ([], None, [])
