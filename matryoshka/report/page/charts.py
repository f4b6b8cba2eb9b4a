"""Charts as SVG text for a page with the colours of style.css: they follow its light and its dark
theme.

Every mark has a <title>, which browsers show under the pointer and read aloud.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 14, 50


@dataclass(frozen=True)
class Series:
    """y over x, None where there is no value. low, high: interval of each point. colour: a name of
    style.css (--NAME), or a number from 0 to 1 on its ramp. style: line, dashed, or points alone
    (dots, diamonds).
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: str | float = "first"
    style: str = "line"

    @property
    def ink(self) -> str:
        if isinstance(self.colour, str):
            return f"var(--{self.colour})"
        return f"color-mix(in oklch, var(--ramp-start), var(--ramp-end) {100 * self.colour:.0f}%)"

    def points(self) -> list[tuple[int, float, float]]:
        return [
            (i, float(a), float(b))
            for i, (a, b) in enumerate(zip(self.x, self.y, strict=True))
            if b is not None
        ]


def number(value: float) -> str:
    """Short: 8, 180, 13.2, 0.46."""
    if value == round(value) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers that span low..high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] | None = None,
    log2: bool = True,
    percent: bool = True,
    height: int = HEIGHT,
) -> Markup:
    """Lines and points; the y-axis spans at least 5, so that noise does not look like a trend."""
    shown = [s for s in series if s.points()]
    xs = [x for s in shown for _, x, _ in s.points()]
    ys = [y for s in shown for _, _, y in s.points()]
    ys += [v for s in shown for side in (s.low, s.high) for v in side or ()]
    middle, half = (
        (min(ys) + max(ys)) / 2,
        max((max(ys) - min(ys)) * 0.54, 2.5 if percent else 1e-6),
    )
    y_ticks = nice_ticks(
        max(0.0, middle - half), min(100.0, middle + half) if percent else middle + half
    )
    if percent:
        y_ticks = [t for t in y_ticks if 0 <= t <= 100]
    x_ticks = (
        list(x_ticks)
        if x_ticks is not None
        else nice_ticks(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    )
    scale = math.log2 if log2 else float
    across = [scale(v) for v in (min([*xs, *x_ticks]), max([*xs, *x_ticks]))]
    pad = 0.04 * ((across[1] - across[0]) or 1)
    across = [across[0] - pad, across[1] + pad]
    bottom, top = y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (scale(x) - across[0]) / (across[1] - across[0])

    def py(y: float) -> float:
        return height - BOTTOM - (height - TOP - BOTTOM) * (y - bottom) / (top - bottom)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    for tick in y_ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" '
            f'y2="{py(tick):.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{py(tick) + 4:.1f}" '
            f'text-anchor="end">{number(tick)}</text>'
        )
    parts += [
        f'<text class="tick" x="{px(t):.1f}" y="{height - BOTTOM + 20}" '
        f'text-anchor="middle">{number(t)}</text>'
        for t in x_ticks
    ]
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 8}" '
        'text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    middle_y = (TOP + height - BOTTOM) / 2
    parts.append(
        f'<text class="label up" transform="translate(14 {middle_y}) rotate(-90)" '
        'text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for s in shown:
        parts += _drawn(s, px, py, percent)
    return Markup("".join([*parts, "</svg>"]))


def _drawn(s: Series, px, py, percent: bool) -> list[str]:
    points = s.points()
    parts = [f'<g style="color:{s.ink}">']
    if s.low is not None and s.high is not None:
        if s.style == "line":
            upper = [f"{px(x):.1f},{py(s.high[i]):.1f}" for i, x, _ in points]
            lower = [f"{px(x):.1f},{py(s.low[i]):.1f}" for i, x, _ in reversed(points)]
            parts.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
        else:
            for i, x, _ in points:
                y1, y2 = py(s.low[i]), py(s.high[i])
                parts.append(
                    f'<line class="bar" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{y1:.1f}" '
                    f'y2="{y2:.1f}"/>'
                )
    if s.style in ("line", "dashed") and len(points) > 1:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for _, x, y in points)
        parts.append(f'<polyline class="{s.style}" points="{path}"/>')
    unit = " %" if percent else ""
    for i, x, y in points if s.style != "line" or len(points) <= 60 else ():
        interval = (
            f" ({number(s.low[i])} to {number(s.high[i])})"
            if s.low is not None and s.high is not None
            else ""
        )
        said = f"<title>{escape(s.label)}, {number(x)}: {y:.2f}{unit}{interval}</title>"
        if s.style == "diamonds":
            cx, cy = px(x), py(y)
            parts.append(
                f'<path class="mark" d="M{cx:.1f} {cy - 7:.1f}l6 7l-6 7l-6 -7z">{said}</path>'
            )
        else:
            radius = 2.5 if s.style == "dashed" else 4
            parts.append(
                f'<circle class="mark" cx="{px(x):.1f}" cy="{py(y):.1f}" '
                f'r="{radius}">{said}</circle>'
            )
    return [*parts, "</g>"]


def bar_chart(
    names: Sequence[str], values: Sequence[float], title: str, y_label: str, height: int = 260
) -> Markup:
    """A bar for each name, its value above; the last one in another colour."""
    ticks = [t for t in nice_ticks(0, max([*values, 1.0])) if t <= 100]
    room = (WIDTH - LEFT - RIGHT) / len(names)

    def py(y: float) -> float:
        return height - BOTTOM - (height - TOP - 14 - BOTTOM) * y / ticks[-1]

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" '
            f'y2="{py(tick):.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{py(tick) + 4:.1f}" '
            f'text-anchor="end">{number(tick)}</text>'
        )
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        x, top = LEFT + (i + 0.14) * room, py(value)
        colour = "second" if i == len(names) - 1 else "first"
        parts.append(
            f'<rect style="fill:var(--{colour})" x="{x:.1f}" y="{top:.1f}" '
            f'width="{0.72 * room:.1f}" rx="2" '
            f'height="{max(height - BOTTOM - top, 0.5):.1f}"><title>{escape(name)}: {value:.2f} '
            "%</title></rect>"
        )
        centre = x + 0.36 * room
        parts.append(
            f'<text class="value" x="{centre:.1f}" y="{top - 5:.1f}" '
            f'text-anchor="middle">{value:.1f}</text>'
        )
        parts.append(
            f'<text class="tick" x="{centre:.1f}" y="{height - BOTTOM + 20}" '
            f'text-anchor="middle">{escape(name)}</text>'
        )
    middle = (TOP + height - BOTTOM) / 2
    parts.append(
        f'<text class="label up" transform="translate(14 {middle}) rotate(-90)" '
        'text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return Markup("".join([*parts, "</svg>"]))


def heat_map(names: Sequence[str], values: Sequence[Sequence[float]], title: str) -> Markup:
    """A square of percentages with their numbers; pale at the least of them."""
    side, left, top = 58, 62, 30
    size = side * len(names)
    least = min(v for row in values for v in row)
    parts = [
        f'<svg class="chart heat" viewBox="0 0 {left + size + 4} {top + size + 4}" role="img" '
        f'style="max-width:{left + size + 4}px" aria-label="{escape(title)}">'
    ]
    for i, name in enumerate(names):
        centre = i * side + side / 2
        parts.append(
            f'<text class="tick" x="{left + centre}" y="{top - 10}" '
            f'text-anchor="middle">{escape(name)}</text>'
        )
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{top + centre + 4}" '
            f'text-anchor="end">{escape(name)}</text>'
        )
        for j, value in enumerate(values[i]):
            strength = 0.06 + 0.6 * (value - least) / ((100 - least) or 1)
            x, y = left + j * side, top + i * side
            said = f"{escape(name)} and {escape(names[j])}: {value:.2f} %"
            parts.append(
                f'<rect class="cell" x="{x + 1}" y="{y + 1}" width="{side - 2}" '
                f'height="{side - 2}" rx="3" '
                f'fill-opacity="{strength:.3f}"><title>{said}</title></rect>'
                f'<text class="value" x="{x + side / 2}" y="{y + side / 2 + 4}" '
                f'text-anchor="middle">{value:.1f}</text>'
            )
    return Markup("".join([*parts, "</svg>"]))


def reliability(
    name: str,
    confidence: Sequence[float | None],
    accuracy: Sequence[float | None],
    images: Sequence[int],
) -> Markup:
    """Accuracy over confidence in bins, with the diagonal; the bars below say how many images a bin
    has.
    """
    side, left, bottom, low = 180, 34, 26, 24
    bins, most = len(images), max(images) or 1
    parts = [
        f'<svg class="chart small" viewBox="0 0 {left + side + 16} {side + low + bottom + 18}" '
        'role="img" '
        f'aria-label="reliability of {escape(name)}">',
        f'<rect class="frame" x="{left}" y="8" width="{side}" height="{side}"/>',
        f'<line class="ideal" x1="{left}" y1="{side + 8}" x2="{left + side}" y2="8"/>',
    ]
    for b in range(bins):
        x, width = left + side * b / bins, side / bins
        tall = low * images[b] / most
        parts.append(
            f'<rect class="count" x="{x + 0.5:.1f}" y="{side + 12:.1f}" width="{width - 1:.1f}" '
            f'height="{tall:.1f}"/>'
        )
        sure, right = confidence[b], accuracy[b]
        if sure is None or right is None:
            continue
        said = f"confidence {sure:.1f} %, right {right:.1f} % of {images[b]:,} images"
        parts.append(
            f'<rect class="reliable" x="{x + 0.5:.1f}" y="{8 + side * (1 - right / 100):.1f}" '
            f'width="{width - 1:.1f}" '
            f'height="{side * right / 100:.1f}"><title>{said}</title></rect>'
        )
    for tick in (0, 50, 100):
        across, under = left + side * tick / 100, side + low + bottom + 2
        parts.append(
            f'<text class="tick" x="{left - 5}" y="{12 + side * (1 - tick / 100)}" '
            f'text-anchor="end">{tick}</text>'
            f'<text class="tick" x="{across}" y="{under}" text-anchor="middle">{tick}</text>'
        )
    return Markup("".join([*parts, "</svg>"]))
