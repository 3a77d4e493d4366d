import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adashard_server.telemetry.outliers import FACTOR, LEAST, WINDOW, Outlier, Outliers
from adashard_server.telemetry.points import StepPoint


def a_point(step, rms, **fields):
    return StepPoint(step=step, time_s=0.0, update_rms=rms, **fields)


def look(outliers, updates, *, job="a", first=1):
    """What is said of steps with these updates."""
    points = [a_point(step, rms) for step, rms in enumerate(updates, first)]
    return [outliers.look(job, point) for point in points]


def steps(found):
    return [one.step for one in found if one is not None]


@given(st.lists(st.floats(0.1, 100.0), max_size=250), st.sampled_from([0.0, 20.0]))
def test_the_first_of_each_run_above_the_level_or_the_bound_is_named(updates, most):
    was_out, expected = False, []
    for number, rms in enumerate(updates):
        past = updates[max(0, number - WINDOW) : number]
        usual = FACTOR * statistics.median(past) if len(past) >= LEAST else math.inf
        out = rms > min(usual, most or math.inf)
        expected += [number + 1] if out and not was_out else []
        was_out = out
    assert steps(look(Outliers(most), updates)) == expected


def test_what_is_said_has_the_bound_and_where_it_comes_from():
    (*_, found) = look(Outliers(), [1.0] * 40 + [9.0])
    assert found == Outlier(41, 9.0, 5.0, "5 times the median of the last 40 steps")
    (found,) = look(Outliers(2.0), [9.0])
    assert found == Outlier(1, 9.0, 2.0, "the setting max_update_rms")


@pytest.mark.parametrize("fields", [{"skipped": True, "rms": 9.0}, {"rms": 0.0}])
def test_a_step_without_an_update_is_passed_over(fields):
    outliers = Outliers(1.0)
    assert outliers.look("a", a_point(1, **fields)) is None
    assert steps(look(outliers, [9.0], first=2)) == [2]


def test_an_update_that_is_not_finite_is_out_of_line():
    assert steps(look(Outliers(5.0), [1.0, math.nan, math.inf, 1.0])) == [2]


def test_jobs_have_levels_of_their_own_until_they_are_forgotten():
    outliers = Outliers()
    look(outliers, [1.0] * LEAST)
    assert steps(look(outliers, [9.0], job="b")) == []
    outliers.forget("a")
    outliers.forget("nobody")
    assert steps(look(outliers, [9.0])) == []
