"""Line charts as SVG to put into a page: they take its colours, light or dark.

A plotting library takes half a second for each, which a page that is written anew and anew while a
run trains cannot have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ["#4c8dd6", "#e0762f", "#3fa35b", "#c355a0", "#a58a12", "#7d6fd0", "#d34a4a", "#2b9a9a"]
WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 44, 40  # margins
Line = tuple[Sequence[float], Sequence[float]]  # x and y


def chart(
    title: str,
    lines: Mapping[str, Line],
    *,
    across: str = "iterations",
    log: bool = False,
    level: float | None = None,
) -> str:
    """An SVG of lines by name.

    Args:
        across: what x is.
        log: whether y is logarithmic; where a value is not above zero it is not.
        level: a y to mark.
    """
    values = [y for _, ys in lines.values() for y in ys] + ([] if level is None else [level])
    log = log and min(values) > 0
    scaled = [math.log10(y) if log else y for y in values]
    low, high = _widened(min(scaled), max(scaled))
    last = max(x for xs, _ in lines.values() for x in xs) or 1

    def at(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / last

    def up(y: float) -> float:
        part = ((math.log10(y) if log else y) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * part

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-size="12" fill="currentColor">',
        f'<text x="{LEFT}" y="14" font-size="13" font-weight="600">{escape(title)}</text>',
    ]
    for y in ticks_of_log(low, high) if log else ticks(low, high):
        parts += [
            f'<path d="M{LEFT} {up(y):.1f}H{WIDTH - RIGHT}" stroke="currentColor" opacity=".15"/>',
            f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:g}</text>',
        ]
    for x in ticks(0, last):
        parts += [
            f'<text x="{at(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:,g}</text>'
        ]
    middle = (LEFT + WIDTH - RIGHT) // 2
    parts += [f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>']
    if level is not None:
        parts += [
            f'<path d="M{LEFT} {up(level):.1f}H{WIDTH - RIGHT}" stroke="currentColor" '
            'stroke-dasharray="2 3"/>'
        ]
    beside = float(LEFT)
    for k, (name, (xs, ys)) in enumerate(lines.items()):
        colour = COLOURS[k % len(COLOURS)]
        points = " ".join(f"{at(x):.1f},{up(y):.1f}" for x, y in zip(xs, ys, strict=True))
        parts += [f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>']
        if len(xs) == 1:  # a line of one point is not seen
            parts += [f'<circle cx="{at(xs[0]):.1f}" cy="{up(ys[0]):.1f}" r="3" fill="{colour}"/>']
        if len(lines) > 1:
            parts += [
                f'<path d="M{beside:.0f} 30h14" stroke="{colour}" stroke-width="3"/>',
                f'<text x="{beside + 18:.0f}" y="34">{escape(name)}</text>',
            ]
            beside += 34 + 6.4 * len(name)
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers within."""
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * k for k in (1, 2, 5, 10) if (high - low) / (size * k) < 7.5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def ticks_of_log(low: float, high: float) -> list[float]:
    """Round numbers from 10^low to 10^high: powers of ten, and 2 and 5 times these if few;
    other round numbers if still few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    each = (1, 2, 5) if high - low < 2.5 else (1,)
    found = [round(k * 10**n, 12) if n > -12 else k * 10.0**n for n in powers for k in each]
    found = [y for y in found if low <= math.log10(y) <= high]
    return found if len(found) > 1 else ticks(10**low, 10**high)


def _widened(low: float, high: float) -> tuple[float, float]:
    room = 0.05 * (high - low) or 0.05 * abs(low) or 1.0
    return low - room, high + room


def smooth(values: Sequence[tuple[int, float]], points: int = 100) -> Line:
    """Means over at most ``points`` stretches of (iteration, value)."""
    size = max(1, -(-len(values) // points))
    parts = [values[first : first + size] for first in range(0, len(values), size)]
    x = [part[-1][0] for part in parts]
    return x, [sum(value for _, value in part) / len(part) for part in parts]
