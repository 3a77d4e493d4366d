"""Line plots on two logarithmic axes, as SVG files that need nothing to be read.

Lines are told apart by the shape of their points and a label at their end, not by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 120, 44, 56
_COLOURS = ("#1f5fa8", "#b3451b", "#2c7a3f", "#7a3b8f")
_FONT = 'font-family="sans-serif"'


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One of the two axes.

    Attributes:
        label: what it shows, with its unit.
        ticks: values that are written beside it, ascending.
        form: how a value is written.
    """

    label: str
    ticks: Sequence[float]
    form: Callable[[float], str] = "{:g}".format


def powers(points: Sequence[float], base: float) -> list[float]:
    """Powers of a base, or parts of a power where they are few, that enclose positive values.

    Args:
        points: at least one, all above 0.
        base: above 1.
    """
    low = math.floor(math.log(min(points), base) + 1e-9)
    high = max(low + 1, math.ceil(math.log(max(points), base) - 1e-9))
    return [float(base) ** exponent for exponent in range(low, high + 1)]


def line_plot(title: str, lines: Mapping[str, Sequence[Point]], x: Axis, y: Axis) -> str:
    """A plot of lines by name; all coordinates are above 0 and within the axes' ticks."""
    across = _scale(x.ticks, _LEFT, _WIDTH - _RIGHT)
    down = _scale(y.ticks, _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" {_FONT} font-size="13">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        _text(_WIDTH / 2, 24, title, size=15),
        *_grid(x, y, across, down),
    ]
    for number, (name, points) in enumerate(lines.items()):
        places = [(across(px), down(py)) for px, py in points]
        parts += _line(name, places, number)
    return "\n".join([*parts, "</svg>", ""])


def _scale(ticks: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    low, high = math.log(ticks[0]), math.log(ticks[-1])
    return lambda value: first + (last - first) * (math.log(value) - low) / (high - low)


def _grid(
    x: Axis, y: Axis, across: Callable[[float], float], down: Callable[[float], float]
) -> Iterator[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for tick in x.ticks:
        at = across(tick)
        yield _stroke(at, _TOP, at, bottom)
        yield _text(at, bottom + 18, x.form(tick))
    for tick in y.ticks:
        at = down(tick)
        yield _stroke(_LEFT, at, right, at)
        yield _text(_LEFT - 8, at + 4, y.form(tick), anchor="end")
    yield _text((_LEFT + right) / 2, _HEIGHT - 14, x.label)
    yield f'<g transform="translate(20 {(_TOP + bottom) / 2:.1f}) rotate(-90)">'
    yield _text(0, 0, y.label)
    yield "</g>"


def _line(name: str, places: Sequence[Point], number: int) -> Iterator[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for px, py in places:
        yield _mark(px, py, number, colour)
    px, py = places[-1]
    yield _text(px + 10, py + 4, name, anchor="start", fill=colour)


def _mark(px: float, py: float, number: int, colour: str) -> str:
    """A circle, a square, a triangle or a diamond."""
    if number % len(_COLOURS) == 0:
        return f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>'
    shapes = (
        ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        ((0, -5), (5, 4), (-5, 4)),
        ((0, -6), (6, 0), (0, 6), (-6, 0)),
    )
    corners = shapes[number % len(_COLOURS) - 1]
    path = " ".join(f"{px + dx:.1f},{py + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}" fill="{colour}"/>'


def _stroke(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _text(
    px: float, py: float, text: str, *, anchor: str = "middle", fill: str = "#222", size: int = 13
) -> str:
    place = f'x="{px:.1f}" y="{py:.1f}" text-anchor="{anchor}" fill="{fill}"'
    return f'<text {place} font-size="{size}">{escape(text)}</text>'
