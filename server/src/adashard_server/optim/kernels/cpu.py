"""Adafactor's passes over one slice on a CPU, compiled, with every addition in a written order.

The same bits come out on every machine, whatever the width of its vector unit:

- Sums along a row go into 64 lanes, element j into lane j mod 64, and the lanes into one number by
  a halving tree. The source states that order, so the compiler may use vectors of any width and
  needs no leave to reorder. After `_RUN` elements a sum is carried on in float64, so that long
  rows lose nothing.
- Sums along a column go over blocks of four rows, counted from the slice's first row, then over
  the rows that are left one by one.
- No fastmath and no contraction: `a * b + c` is rounded twice everywhere, with an FMA unit or not.
- Roots and quotients are IEEE's, correctly rounded; no approximate reciprocals.
- Denormal numbers are kept, not flushed.

All functions drop the GIL and write only what their docstring says. Arrays are C-contiguous and
of float32 unless said otherwise; shapes are (B, N, M): B matrices of N rows and M columns.
`passes.py` states the same in a line or two each, and what the arguments mean.

Inner loops index slices that begin at their first element: with an offset in the index the
compiler cannot rule out negative ones, and gives up on vectors.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

_LANES = 64
_RUN = 4096  # elements of a row that are summed in float32; a multiple of the lanes
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)

_compiled = numba.njit(nogil=True, error_model="numpy", cache=True)


# --- sums along a row ----------------------------------------------------------------------------


@_compiled
def _halved(lanes: NDArray[Any]) -> float:
    """The sum of the lanes, added in their format by a halving tree; overwrites them."""
    width = _LANES // 2
    while width > 0:
        for lane in range(width):
            lanes[lane] += lanes[lane + width]
        width //= 2
    return np.float64(lanes[0])


@_compiled
def _square_sum(row: Array, scale: np.float32, lanes: Array) -> float:
    """Sum of (scale * row)^2 in float64; not finite where a run's sum is beyond float32."""
    total = 0.0
    for start in range(0, row.size, _RUN):
        run = row[start : start + _RUN]
        blocks = run.size // _LANES
        lanes[:] = _ZERO
        for block in range(blocks):
            piece = run[block * _LANES : (block + 1) * _LANES]
            for lane in range(_LANES):
                value = piece[lane] * scale
                lanes[lane] += value * value
        rest = run[blocks * _LANES :]
        for lane in range(rest.size):
            value = rest[lane] * scale
            lanes[lane] += value * value
        total += _halved(lanes)
    return total


@_compiled
def _wide_square_sum(row: Array, scale: np.float32) -> float:
    """The same, element by element in float64; NaN where an element is not finite."""
    total = 0.0
    for at in range(row.size):
        value = np.float64(row[at] * scale)
        total += value * value
    return total if math.isfinite(total) else math.nan


@_compiled
def _bounded_square_sum(row: Array, scale: np.float32, bound: np.float32) -> float:
    """Sum of min((scale * row)^2, bound), element by element in float64."""
    total = 0.0
    for at in range(row.size):
        value = row[at] * scale
        total += np.float64(min(value * value, bound))
    return total


@_compiled
def _square_sums(
    row: Array, scale: np.float32, bound: np.float32, lanes: Array
) -> tuple[float, float]:
    """Sum of squares as they are, and as they are bounded: equal unless there are huge ones."""
    summed = _square_sum(row, scale, lanes)
    if summed <= bound:
        return summed, summed
    return _wide_square_sum(row, scale), _bounded_square_sum(row, scale, bound)


@_compiled
def square_sum(matrix: Array, scale: np.float32) -> float:
    """Sum of (scale * matrix)^2 of (N, M), row by row; NaN where an element is not finite."""
    lanes = np.empty(_LANES, np.float32)
    total = 0.0
    for i in range(matrix.shape[0]):
        of_row = _square_sum(matrix[i], scale, lanes)
        total += of_row if math.isfinite(of_row) else _wide_square_sum(matrix[i], scale)
    return total


# --- the first pass: squares of the gradient, summed both ways -----------------------------------


@_compiled
def _mixed(old: np.float32, latest: float, beta2: float) -> np.float32:
    """The moving average with the latest mean in it."""
    return np.float32(beta2 * np.float64(old) + (1.0 - beta2) * latest)


@_compiled
def _inverse(moment: np.float32) -> np.float32:
    """1 / moment, and 0 where that is beyond float32: such a moment counts as none."""
    inverse = _ONE / moment
    return inverse if math.isfinite(inverse) else _ZERO


@_compiled
def _add_block(block: Array, scale: np.float32, q: Array, squares: Array, ratios: Array) -> None:
    """Adds the squares of four rows, and the same times each row's `q`, column by column."""
    row0, row1, row2, row3 = block[0], block[1], block[2], block[3]
    q0, q1, q2, q3 = q[0], q[1], q[2], q[3]
    for j in range(squares.size):
        g0, g1, g2, g3 = row0[j] * scale, row1[j] * scale, row2[j] * scale, row3[j] * scale
        s0, s1, s2, s3 = g0 * g0, g1 * g1, g2 * g2, g3 * g3
        squares[j] += (s0 + s1) + (s2 + s3)
        ratios[j] += (s0 * q0 + s1 * q1) + (s2 * q2 + s3 * q3)


@_compiled
def _add_row(
    row: Array, scale: np.float32, q: np.float32, bound: np.float32, squares: Array, ratios: Array
) -> None:
    """The same of one row, where squares may be beyond float32: G q G is not."""
    for j in range(squares.size):
        g = row[j] * scale
        squares[j] += min(g * g, bound)
        ratios[j] += (g * q) * g


@_compiled
def _add_rows(
    rows: Array,
    scale: np.float32,
    q: Array,
    bound: np.float32,
    ordinary: bool,
    squares: Array,
    ratios: Array,
) -> None:
    """The same of up to four rows; `ordinary` says that no square is above the bound."""
    if ordinary and rows.shape[0] == 4:
        _add_block(rows, scale, q, squares, ratios)
    else:
        for i in range(rows.shape[0]):
            _add_row(rows[i], scale, q[i], bound, squares, ratios)


@_compiled
def rows_first(
    gradient: Array,
    scale: np.float32,
    row_old: Array,
    beta2: float,
    eps1: float,
    bound: np.float32,
    row_new: Array,
    squares: Array,
    ratios: Array,
) -> float:
    """See `passes.rows_first`; writes the last three."""
    lanes, q = np.empty(_LANES, np.float32), np.empty(4, np.float32)
    squares[:] = _ZERO
    ratios[:] = _ZERO
    batch, height, width = gradient.shape
    total = 0.0
    for b in range(batch):
        for start in range(0, height, 4):
            rows = gradient[b, start : start + 4]
            ordinary = True
            for i in range(rows.shape[0]):
                summed, bounded = _square_sums(rows[i], scale, bound, lanes)
                ordinary &= summed == bounded
                total += summed
                at = start + i
                row_new[b, at] = _mixed(row_old[b, at], bounded / width + eps1, beta2)
                q[i] = _inverse(row_new[b, at])
            _add_rows(rows, scale, q, bound, ordinary, squares[b], ratios[b])
    return total


@_compiled
def _ratio_sum(row: Array, scale: np.float32, q: Array, lanes: Array) -> float:
    """Sum of (scale * row)^2 * q in float64; infinite where a run's sum is beyond float32."""
    total = 0.0
    for start in range(0, row.size, _RUN):
        run, run_q = row[start : start + _RUN], q[start : start + _RUN]
        blocks = run.size // _LANES
        lanes[:] = _ZERO
        for block in range(blocks):
            piece = run[block * _LANES : (block + 1) * _LANES]
            piece_q = run_q[block * _LANES : (block + 1) * _LANES]
            for lane in range(_LANES):
                g = piece[lane] * scale
                lanes[lane] += (g * piece_q[lane]) * g
        rest, rest_q = run[blocks * _LANES :], run_q[blocks * _LANES :]
        for lane in range(rest.size):
            g = rest[lane] * scale
            lanes[lane] += (g * rest_q[lane]) * g
        total += _halved(lanes)
    return total


@_compiled
def columns_first(
    gradient: Array,
    scale: np.float32,
    column_old: Array,
    beta2: float,
    eps1: float,
    bound: np.float32,
    column_new: Array,
    squares: Array,
    ratios: Array,
) -> float:
    """See `passes.columns_first`; writes the last three."""
    lanes, q = np.empty(_LANES, np.float32), np.zeros(4, np.float32)
    batch, height, width = gradient.shape
    sums, inverses = np.empty(width, np.float32), np.empty(width, np.float32)
    total = 0.0
    for b in range(batch):
        sums[:] = _ZERO
        for start in range(0, height, 4):
            rows = gradient[b, start : start + 4]
            ordinary = True
            for i in range(rows.shape[0]):
                summed, bounded = _square_sums(rows[i], scale, bound, lanes)
                ordinary &= summed == bounded
                total += summed
                squares[b, start + i] = np.float32(bounded)
            _add_rows(rows, scale, q, bound, ordinary, sums, inverses)
        for j in range(width):
            latest = np.float64(sums[j]) / height + eps1
            column_new[b, j] = _mixed(column_old[b, j], latest, beta2)
            inverses[j] = _inverse(column_new[b, j])
        for i in range(height):
            ratios[b, i] = np.float32(_ratio_sum(gradient[b, i], scale, inverses, lanes))
    return total


# --- between the passes: what follows from sums over the whole parameter --------------------------


@_compiled
def decay(old: Array, squares: Array, beta2: float, count: int, eps1: float, new: Array) -> None:
    """Mixes sums of squares over `count` elements into the means `old`; writes `new`, all flat."""
    for k in range(old.size):
        new[k] = _mixed(old[k], np.float64(squares[k]) / count + eps1, beta2)


@_compiled
def means(moment: Array, floor: float, out: NDArray[np.float64]) -> None:
    """See `passes.means`; added from the first element to the last; writes `out`."""
    for b in range(moment.shape[0]):
        total = 0.0
        for k in range(moment.shape[1]):
            total += np.float64(moment[b, k])
        out[b] = max(total / moment.shape[1], floor)


@_compiled
def quotient_sum(ratios: Array, moment: Array, numerators: NDArray[np.float64]) -> float:
    """See `passes.quotient_sum`; added from the first element to the last."""
    total = 0.0
    for b in range(moment.shape[0]):
        of_matrix = 0.0
        for k in range(moment.shape[1]):
            if _inverse(moment[b, k]) > _ZERO:
                of_matrix += np.float64(ratios[b, k]) / np.float64(moment[b, k])
        total += of_matrix * numerators[b]
    return total


@_compiled
def inverse_roots(moment: Array, numerators: NDArray[np.float64], out: Array) -> None:
    """See `passes.inverse_roots`; writes `out`."""
    for b in range(moment.shape[0]):
        for k in range(moment.shape[1]):
            root = _ZERO
            if _inverse(moment[b, k]) > _ZERO:
                root = np.float32(math.sqrt(numerators[b] / np.float64(moment[b, k])))
            out[b, k] = root


# --- the second pass: the update ------------------------------------------------------------------


@_compiled
def update(
    weight: Array,
    gradient: Array,
    scale: np.float32,
    step: np.float32,
    row: Array,
    column: Array,
    cap: np.float32,
    keep: np.float32,
) -> float:
    """See `passes.update`; writes `weight`."""
    lanes = np.empty(_LANES, np.float32)
    total = 0.0
    for b in range(weight.shape[0]):
        b_of_column = column[b]
        for i in range(weight.shape[1]):
            x, g, a = weight[b, i], gradient[b, i], row[b, i]
            for j in range(x.size):
                u = (g[j] * scale) * min(a * b_of_column[j], cap)
                x[j] = x[j] * keep - u * step
            total += _weight_square_sum(x, lanes)
    return total


@_compiled
def update_with_momentum(
    weight: Array,
    gradient: Array,
    scale: np.float32,
    step: np.float32,
    row: Array,
    column: Array,
    cap: np.float32,
    keep: np.float32,
    momentum: Array,
    beta1: np.float32,
) -> float:
    """See `passes.update`; writes `weight` and `momentum`."""
    lanes, rest = np.empty(_LANES, np.float32), _ONE - beta1
    total = 0.0
    for b in range(weight.shape[0]):
        b_of_column = column[b]
        for i in range(weight.shape[1]):
            x, g, m, a = weight[b, i], gradient[b, i], momentum[b, i], row[b, i]
            for j in range(x.size):
                u = (g[j] * scale) * min(a * b_of_column[j], cap)
                m[j] = m[j] * beta1 + (u * step) * rest
                x[j] = x[j] * keep - m[j]
            total += _weight_square_sum(x, lanes)
    return total


@_compiled
def _weight_square_sum(row: Array, lanes: Array) -> float:
    """Sum of squares of a row of weights; in float64 throughout where it is beyond float32."""
    total = _square_sum(row, _ONE, lanes)
    return total if math.isfinite(total) else _wide_square_sum(row, _ONE)


@_compiled
def _add_capped(
    row: Array,
    scale: np.float32,
    a: np.float32,
    column: Array,
    cap: np.float32,
    lanes: NDArray[np.float64],
) -> None:
    """Adds the squared updates of one row to the lanes."""
    for start in range(0, row.size, _LANES):
        piece, factors = row[start : start + _LANES], column[start : start + _LANES]
        for lane in range(piece.size):
            u = np.float64((piece[lane] * scale) * min(a * factors[lane], cap))
            lanes[lane] += u * u


@_compiled
def capped_square_sum(
    gradient: Array, scale: np.float32, row: Array, column: Array, cap: np.float32
) -> float:
    """See `passes.capped_square_sum`; the lanes are of float64, and carried over rows."""
    lanes = np.zeros(_LANES, np.float64)
    for b in range(gradient.shape[0]):
        for i in range(gradient.shape[1]):
            _add_capped(gradient[b, i], scale, row[b, i], column[b], cap, lanes)
    return _halved(lanes)


# --- second moments that are not factored ---------------------------------------------------------


@_compiled
def _full_moment(
    old: np.float32, square: np.float32, beta2: np.float32, eps1: np.float32
) -> np.float32:
    return old * beta2 + (square + eps1) * (_ONE - beta2)


@_compiled
def _full_update(g: np.float32, moment: np.float32, floor: np.float32) -> np.float32:
    divisor = max(np.float32(math.sqrt(moment)), floor)
    return g / divisor if divisor > _ZERO else _ZERO


@_compiled
def full_square_sum(
    gradient: Array,
    scale: np.float32,
    moment: Array,
    beta2: np.float32,
    eps1: np.float32,
    floor: np.float32,
    bound: np.float32,
) -> float:
    """See `passes.full_square_sum`; all flat. Infinite where a run's sum is beyond float32."""
    lanes, total = np.empty(_LANES, np.float32), 0.0
    for start in range(0, gradient.size, _RUN):
        run, old = gradient[start : start + _RUN], moment[start : start + _RUN]
        lanes[:] = _ZERO
        for at in range(0, run.size, _LANES):
            piece, piece_old = run[at : at + _LANES], old[at : at + _LANES]
            for lane in range(piece.size):
                g = piece[lane] * scale
                new = _full_moment(piece_old[lane], min(g * g, bound), beta2, eps1)
                u = _full_update(g, new, floor)
                lanes[lane] += u * u
        total += _halved(lanes)
    return total


@_compiled
def update_full(
    weight: Array,
    gradient: Array,
    scale: np.float32,
    step: np.float32,
    moment: Array,
    beta2: np.float32,
    eps1: np.float32,
    floor: np.float32,
    bound: np.float32,
    keep: np.float32,
    momentum: Array,
    beta1: np.float32,
) -> float:
    """See `passes.update_full`; `momentum` is empty where there is none; all flat."""
    lanes, rest, total = np.empty(_LANES, np.float32), _ONE - beta1, 0.0
    for start in range(0, weight.size, _RUN):
        x, g = weight[start : start + _RUN], gradient[start : start + _RUN]
        v, m = moment[start : start + _RUN], momentum[start : start + _RUN]
        for at in range(x.size):
            value = g[at] * scale
            v[at] = _full_moment(v[at], min(value * value, bound), beta2, eps1)
            u = _full_update(value, v[at], floor) * step
            if m.size > 0:
                m[at] = m[at] * beta1 + u * rest
                u = m[at]
            x[at] = x[at] * keep - u
        total += _weight_square_sum(x, lanes)
    return total


# --- sums over workers ----------------------------------------------------------------------------


@_compiled
def accumulate(total: Array, addend: Array, share: np.float32, first: bool) -> None:
    """Adds `share * addend` to `total`, or puts it there if it is the `first`; flat, in place."""
    if first:
        for at in range(total.size):
            total[at] = addend[at] * share
    else:
        for at in range(total.size):
            total[at] += addend[at] * share
