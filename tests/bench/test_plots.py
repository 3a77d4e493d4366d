"""Plots are whole, and show every point within their frame."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from benchmarks.plots import Axis, line_plot, powers
from hypothesis import given
from hypothesis import strategies as st

SVG = "{http://www.w3.org/2000/svg}"
positive = st.floats(1e-6, 1e12)


@given(values=st.lists(positive, min_size=1), base=st.sampled_from([2.0, 4.0, 10.0]))
def test_powers_enclose_what_they_are_the_ticks_of(values, base):
    ticks = powers(values, base)
    assert len(ticks) >= 2
    assert ticks == sorted(ticks)
    assert ticks[0] <= min(values) * (1 + 1e-6)
    assert ticks[-1] >= max(values) * (1 - 1e-6)


@given(
    lines=st.dictionaries(
        st.text("ab<&>\"'", min_size=1),
        st.lists(st.tuples(positive, positive), min_size=1, max_size=5),
        min_size=1,
        max_size=5,
    )
)
def test_a_plot_is_a_document_with_every_line_and_every_point_in_its_frame(lines):
    points = [point for line in lines.values() for point in line]
    xs, ys = zip(*points, strict=True)
    axes = Axis(label="x", ticks=powers(xs, 10)), Axis(label="y", ticks=powers(ys, 10))
    root = ElementTree.fromstring(line_plot("a < b & c", lines, *axes))
    drawn = root.findall(f"{SVG}polyline")
    assert [len(line.attrib["points"].split()) for line in drawn] == list(map(len, lines.values()))
    marks = root.findall(f"{SVG}circle") + root.findall(f"{SVG}polygon")
    assert len(marks) == len(points)
    for line in drawn:
        for x, y in re.findall(r"([-\d.]+),([-\d.]+)", line.attrib["points"]):
            assert 0 <= float(x) <= 640
            assert 0 <= float(y) <= 400
    assert {text.text for text in root.findall(f"{SVG}text")} >= set(lines)
