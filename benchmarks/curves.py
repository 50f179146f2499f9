"""Curves over a logarithmic axis as SVG text: enough for a page of the docs, and nothing to install."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 400, 60, 20, 20, 50
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


@dataclass
class Curve:
    name: str
    points: list[tuple[float, float]]  # x > 0, y from 0 to 1, x ascending


def svg(curves: Sequence[Curve], x_title: str, y_title: str, limit: float) -> str:
    """`limit`: a dashed line, what could be reached at most; the y axis ends a little above it."""
    xs = [x for curve in curves for x, _ in curve.points]
    low, high = math.log2(min(xs)), math.log2(max(xs))
    y_end = math.ceil(limit * 10.5) / 10

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - low) / ((high - low) or 1)
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - y / y_end * (HEIGHT - TOP - BOTTOM), 1),
        )

    parts = [_rule(place(min(xs), 0), place(max(xs), 0)), _rule(place(min(xs), 0), place(min(xs), y_end))]
    for x in sorted(set(xs)):
        parts.append(_text(place(x, 0)[0], HEIGHT - BOTTOM + 18, f"{x:g}"))
    for tenth in range(int(y_end * 10 + 1e-9) + 1):
        parts.append(_text(LEFT - 22, place(min(xs), tenth / 10)[1] + 4, f"{10 * tenth} %"))
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 10, x_title))
    parts.append(_text(LEFT + 4, TOP - 6, y_title, anchor="start"))
    parts.append(_rule(place(min(xs), limit), place(max(xs), limit), dashes="6 4"))
    parts.append(_text(LEFT + 10, place(1, limit)[1] - 6, f"without bounds: {limit:.1%}", anchor="start"))
    for number, (curve, colour) in enumerate(zip(curves, COLOURS, strict=False)):
        places = [place(*point) for point in curve.points]
        line = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places]
        at = HEIGHT - BOTTOM - 14 - 18 * (len(curves) - 1 - number)
        parts.append(_text(WIDTH - RIGHT - 8, at, curve.name, anchor="end", colour=colour))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _rule(begin: tuple[float, float], end: tuple[float, float], dashes: str = "none") -> str:
    (x1, y1), (x2, y2) = begin, end
    return f'<path d="M{x1} {y1}L{x2} {y2}" stroke="#444" stroke-dasharray="{dashes}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "#444") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
