"""What was asked and reached is judged, told and tabulated as it says."""

from __future__ import annotations

import json
import math

import pytest
from benchmarks.machine import slug
from benchmarks.targets import table, target, unmeasured, write_json
from hypothesis import given
from hypothesis import strategies as st

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(asked=finite, reached=finite, better=st.sampled_from(["lower", "higher"]))
def test_a_target_is_met_on_its_side_of_the_bound_and_at_it(asked, reached, better):
    found = target("name", asked, reached, better)
    assert found["met"] == (reached == asked or (reached < asked) == (better == "lower"))
    assert target("name", asked, asked, better)["met"]
    assert (found["asked"], found["reached"]) == (asked, reached)


@pytest.mark.parametrize("reached", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_met_and_can_be_written(reached, tmp_path):
    for better in ("lower", "higher"):
        found = target("name", 1.0, reached, better)
        assert (found["met"], found["reached"]) == (False, None)
        write_json(tmp_path / "found.json", {"targets": [found]})
        assert json.loads((tmp_path / "found.json").read_text()) == {"targets": [found]}


def test_what_was_not_measured_is_neither_met_nor_missed():
    found = unmeasured("name", 2.0, "higher", "ray is not installed")
    assert (found["reached"], found["met"]) == (None, None)
    assert "not measured" in table({"peers": [found]}, {})
    assert "ray is not installed" in table({"peers": [found]}, {})


@given(
    names=st.lists(st.text("ab|c ", min_size=1), max_size=4),
    failed=st.dictionaries(st.text("xy", min_size=1), st.text("a|b")),
)
def test_the_table_has_a_line_for_each_target_and_each_script_that_failed(names, failed):
    targets = [target(name, 1.0, 0.5, "higher") for name in names]
    lines = table({"script": targets}, failed).splitlines()
    assert len(lines) == 2 + len(names) + len(failed)
    assert len({len(line) for line in lines}) == 1
    columns = {line.replace("\\|", "").count("|") for line in lines}
    assert columns == {6}
    assert sum("not met" in line for line in lines) == len(names)


def test_nothing_is_written_where_no_file_is_named():
    write_json(None, {"targets": []})


def test_a_machine_has_a_name_that_files_can_have():
    assert slug({"cpu": "Intel(R) Xeon(R) CPU @ 2.00GHz", "cores": 2}) == (
        "intel-r-xeon-r-cpu-2-00ghz-2-cores"
    )
