"""Charts as inline SVG, coloured by the variables of style.css in light and dark theme.

Charts with axes are drawn twice, for the page's column and for a phone, because scaled text would
be unreadable; style.css shows one of them. Every mark has a <title>, which browsers show as a
tooltip and screen readers read aloud.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 952, 360  # the width of the column
PHONE_WIDTH = 350
# Margins around the plot area: the numbers and the label of the y-axis are at its left, those of
# the x-axis below it.
LEFT = 58
RIGHT = 18
TOP = 14
BOTTOM = 50
MIN_SPAN = 5.0  # percentage points on the y-axis: noise should not look like a trend
MIN_RELATIVE_SPAN = 0.05  # of other values, for the same reason
CHARACTER = 7.6  # width of a digit of the ticks, in pixels
MAX_MARKED_POINTS = 60  # longer lines are drawn without a mark for each point

Scale = Callable[[float], float]  # value -> position in the SVG


@dataclass(frozen=True)
class Series:
    """y over x; None marks a missing value.

    low, high: interval of each point. colour: the name of a variable of style.css (--NAME), or a
    number from 0 to 1 on its colour ramp. style: "line", "dashed", or single points ("points",
    "diamonds").
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: str | float = "first"
    style: str = "line"

    @property
    def css_colour(self) -> str:
        if isinstance(self.colour, str):
            return f"var(--{self.colour})"
        return f"color-mix(in oklch, var(--ramp-start), var(--ramp-end) {100 * self.colour:.0f}%)"

    def points(self) -> list[tuple[int, float, float]]:
        """(index, x, y) of the points that have a value."""
        present = []
        for i, (x, y) in enumerate(zip(self.x, self.y, strict=True)):
            if y is not None:
                present.append((i, float(x), float(y)))
        return present


def number(value: float) -> str:
    """A short number: 8, 180, 13.2, 0.46."""
    if value == round(value) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers that span low..high, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    # 1e-9: a bound that is a tick except for rounding must not add another one.
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


# ---------------------------------------------------------------- axes


def _svg_tag(width: float, height: float, title: str, *, css: str = "chart", more: str = "") -> str:
    return (
        f'<svg class="{css}" viewBox="0 0 {width} {height}" role="img" '
        f'{more}aria-label="{escape(title)}">'
    )


def _for_both_widths(draw: Callable[[int], str]) -> Markup:
    """The chart of draw(width) for a wide and for a narrow page."""
    wide, narrow = draw(WIDTH), draw(PHONE_WIDTH)
    return Markup(f'<div class="on-wide">{wide}</div><div class="on-narrow">{narrow}</div>')


def without_overlaps(ticks: Sequence[float], x_of: Scale) -> list[float]:
    """The ticks whose numbers leave room for each other; the last one always stays."""
    kept: list[float] = []
    left = math.inf  # of the tick to the right
    for tick in sorted(ticks, reverse=True):
        half = CHARACTER * len(number(tick)) / 2
        if x_of(tick) + half + CHARACTER / 2 <= left:
            kept.append(tick)
            left = x_of(tick) - half
    return kept[::-1]


def _y_axis(ticks: Sequence[float], y_of: Scale, width: int) -> list[str]:
    """Grid lines across the plot area, with their numbers at the left."""
    parts = []
    for tick in ticks:
        y = y_of(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" '
            f'text-anchor="end">{number(tick)}</text>'
        )
    return parts


def _y_label(text: str, height: float) -> str:
    middle = (TOP + height - BOTTOM) / 2
    return (
        f'<text class="label up" transform="translate(14 {middle}) rotate(-90)" '
        f'text-anchor="middle">{escape(text)}</text>'
    )


def _y_ticks(values: Sequence[float], percent: bool) -> list[float]:
    """Ticks around the values, over at least MIN_SPAN points if they are percentages."""
    middle = (min(values) + max(values)) / 2
    least = MIN_SPAN if percent else max(MIN_RELATIVE_SPAN * abs(middle), 1e-6)
    half = max((max(values) - min(values)) * 0.54, least / 2)
    low = middle - half
    if min(values) >= 0:
        low = max(0.0, low)
    if not percent:
        return nice_ticks(low, middle + half)
    ticks = nice_ticks(low, min(100.0, middle + half))
    return [tick for tick in ticks if 0 <= tick <= 100]


# ---------------------------------------------------------------- lines and points


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    *,
    x_ticks: Sequence[float] | None = None,
    log2: bool = True,
    percent: bool = True,
    height: int = HEIGHT,
) -> Markup:
    """Lines and points over a shared x-axis, logarithmic to base 2 by default."""
    shown = [s for s in series if s.points()]
    xs = []
    ys = []
    for s in shown:
        for _, x, y in s.points():
            xs.append(x)
            ys.append(y)
        ys += [*(s.low or ()), *(s.high or ())]

    y_ticks = _y_ticks(ys, percent)
    bottom, top = y_ticks[0], y_ticks[-1]
    if x_ticks is None:
        end = max(xs) if max(xs) > min(xs) else min(xs) + 1  # a single x has no span
        x_ticks = nice_ticks(min(xs), end)
    scale = math.log2 if log2 else float
    first = scale(min([*xs, *x_ticks]))
    last = scale(max([*xs, *x_ticks]))
    pad = 0.04 * ((last - first) or 1)  # marks at the ends keep clear of the axes
    first, last = first - pad, last + pad

    def y_of(y: float) -> float:
        return height - BOTTOM - (height - TOP - BOTTOM) * (y - bottom) / (top - bottom)

    def draw(width: int) -> str:
        def x_of(x: float) -> float:
            return LEFT + (width - LEFT - RIGHT) * (scale(x) - first) / (last - first)

        parts = [_svg_tag(width, height, title), *_y_axis(y_ticks, y_of, width)]
        parts += _x_axis(without_overlaps(x_ticks, x_of), x_of, x_label, width, height)
        parts.append(_y_label(y_label, height))
        for s in shown:
            parts.append(f'<g style="color:{s.css_colour}">')
            parts += _intervals(s, x_of, y_of)
            parts += _line(s, x_of, y_of)
            parts += _marks(s, x_of, y_of, unit=" %" if percent else "")
            parts.append("</g>")
        return "".join([*parts, "</svg>"])

    return _for_both_widths(draw)


def _x_axis(ticks: Sequence[float], x_of: Scale, label: str, width: int, height: int) -> list[str]:
    parts = []
    for tick in ticks:
        parts.append(
            f'<text class="tick" x="{x_of(tick):.1f}" y="{height - BOTTOM + 20}" '
            f'text-anchor="middle">{number(tick)}</text>'
        )
    parts.append(
        f'<text class="label" x="{(LEFT + width - RIGHT) / 2}" y="{height - 8}" '
        f'text-anchor="middle">{escape(label)}</text>'
    )
    return parts


def _intervals(s: Series, x_of: Scale, y_of: Scale) -> list[str]:
    """A band along a line, or a bar through each single point."""
    if s.low is None or s.high is None:
        return []
    points = s.points()
    if s.style == "line":
        upper = [f"{x_of(x):.1f},{y_of(s.high[i]):.1f}" for i, x, _ in points]
        lower = [f"{x_of(x):.1f},{y_of(s.low[i]):.1f}" for i, x, _ in reversed(points)]
        return [f'<polygon class="band" points="{" ".join(upper + lower)}"/>']
    return [
        f'<line class="bar" x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" '
        f'y1="{y_of(s.low[i]):.1f}" y2="{y_of(s.high[i]):.1f}"/>'
        for i, x, _ in points
    ]


def _line(s: Series, x_of: Scale, y_of: Scale) -> list[str]:
    points = s.points()
    if s.style not in ("line", "dashed") or len(points) < 2:
        return []
    path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for _, x, y in points)
    return [f'<polyline class="{s.style}" points="{path}"/>']


def _marks(s: Series, x_of: Scale, y_of: Scale, unit: str) -> list[str]:
    points = s.points()
    if s.style == "line" and len(points) > MAX_MARKED_POINTS:
        return []
    parts = []
    for i, x, y in points:
        interval = ""
        if s.low is not None and s.high is not None:
            interval = f" ({number(s.low[i])} to {number(s.high[i])})"
        tip = f"<title>{escape(s.label)}, {number(x)}: {y:.2f}{unit}{interval}</title>"
        cx, cy = x_of(x), y_of(y)
        if s.style == "diamonds":
            parts.append(
                f'<path class="mark" d="M{cx:.1f} {cy - 7:.1f}l6 7l-6 7l-6 -7z">{tip}</path>'
            )
        else:
            radius = 2.5 if s.style == "dashed" else 4
            parts.append(
                f'<circle class="mark" cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}">{tip}</circle>'
            )
    return parts


# ---------------------------------------------------------------- other charts


def bar_chart(
    names: Sequence[str], values: Sequence[float], title: str, y_label: str, height: int = 260
) -> Markup:
    """A bar for each name with its value above it; the last bar has another colour."""
    ticks = [t for t in nice_ticks(0, max([*values, 1.0])) if t <= 100]

    def y_of(y: float) -> float:
        # 14 less than the plot area: the value above the tallest bar
        return height - BOTTOM - (height - TOP - 14 - BOTTOM) * y / ticks[-1]

    def draw(width: int) -> str:
        room = (width - LEFT - RIGHT) / len(names)  # for each bar and its gap
        crowded = room < CHARACTER * 5
        parts = [_svg_tag(width, height, title), *_y_axis(ticks, y_of, width)]
        for i, (name, value) in enumerate(zip(names, values, strict=True)):
            x = LEFT + (i + 0.14) * room
            top = y_of(value)
            centre = x + 0.36 * room
            colour = "second" if i == len(names) - 1 else "first"
            text = f"{value:.0f}" if crowded else f"{value:.1f}"
            # Every second name stands lower where they would touch.
            under = height - BOTTOM + (36 if crowded and i % 2 else 20)
            parts.append(
                f'<rect style="fill:var(--{colour})" x="{x:.1f}" y="{top:.1f}" '
                f'width="{0.72 * room:.1f}" rx="2" height="{max(height - BOTTOM - top, 0.5):.1f}">'
                f"<title>{escape(name)}: {value:.2f} %</title></rect>"
                f'<text class="value" x="{centre:.1f}" y="{top - 5:.1f}" '
                f'text-anchor="middle">{text}</text>'
                f'<text class="tick" x="{centre:.1f}" y="{under}" '
                f'text-anchor="middle">{escape(name)}</text>'
            )
        parts.append(_y_label(y_label, height))
        return "".join([*parts, "</svg>"])

    return _for_both_widths(draw)


def heat_map(names: Sequence[str], values: Sequence[Sequence[float]], title: str) -> Markup:
    """A square matrix of percentages; the smallest one is the palest."""
    return _for_both_widths(lambda width: _heat_map(names, values, title, width))


def _heat_map(
    names: Sequence[str], values: Sequence[Sequence[float]], title: str, most: int
) -> str:
    left, top = 46, 30  # room for the names
    side = min(58.0, (most - left - 4) / len(names))  # of a cell
    crowded = side < CHARACTER * 5
    least = min(min(row) for row in values)
    width, height = left + side * len(names) + 4, top + side * len(names) + 4
    parts = [
        _svg_tag(width, height, title, css="chart heat", more=f'style="max-width:{width:.0f}px" '),
    ]
    for i, name in enumerate(names):
        centre = i * side + side / 2
        raised = 14 if crowded and i % 2 else 0  # every second name, where they would touch
        parts.append(
            f'<text class="tick" x="{left + centre:.1f}" y="{top - 6 - raised}" '
            f'text-anchor="middle">{escape(name)}</text>'
        )
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{top + centre + 4:.1f}" '
            f'text-anchor="end">{escape(name)}</text>'
        )
        for j, value in enumerate(values[i]):
            strength = 0.06 + 0.6 * (value - least) / ((100 - least) or 1)
            x = left + j * side
            y = top + i * side
            text = f"{value:.0f}" if crowded else f"{value:.1f}"
            tip = f"{escape(name)} and {escape(names[j])}: {value:.2f} %"
            parts.append(
                f'<rect class="cell" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{side - 2:.1f}" '
                f'height="{side - 2:.1f}" rx="3" '
                f'fill-opacity="{strength:.3f}"><title>{tip}</title></rect>'
                f'<text class="value" x="{x + side / 2:.1f}" y="{y + side / 2 + 4:.1f}" '
                f'text-anchor="middle">{text}</text>'
            )
    return "".join([*parts, "</svg>"])


def reliability(
    name: str,
    confidence: Sequence[float | None],
    accuracy: Sequence[float | None],
    images: Sequence[int],
) -> Markup:
    """Reliability diagram: accuracy in each bin of confidence, against the diagonal.

    confidence, accuracy: percent, None for an empty bin. A strip below shows the number of images
    in each bin.
    """
    side = 180  # of the plot area
    left, bottom = 40, 26
    strip = 24  # height of the tallest bar below the plot
    bins = len(images)
    most = max(images) or 1
    parts = [
        _svg_tag(
            left + side + 18,
            side + strip + bottom + 18,
            f"reliability of {name}",
            css="chart small",
        ),
        f'<rect class="frame" x="{left}" y="8" width="{side}" height="{side}"/>',
        f'<line class="ideal" x1="{left}" y1="{side + 8}" x2="{left + side}" y2="8"/>',
    ]
    for b in range(bins):
        x = left + side * b / bins
        width = side / bins
        parts.append(
            f'<rect class="count" x="{x + 0.5:.1f}" y="{side + 12:.1f}" width="{width - 1:.1f}" '
            f'height="{strip * images[b] / most:.1f}"/>'
        )
        sure, right = confidence[b], accuracy[b]
        if sure is None or right is None:
            continue
        tip = f"confidence {sure:.1f} %, accuracy {right:.1f} % on {images[b]:,} images"
        parts.append(
            f'<rect class="reliable" x="{x + 0.5:.1f}" y="{8 + side * (1 - right / 100):.1f}" '
            f'width="{width - 1:.1f}" '
            f'height="{side * right / 100:.1f}"><title>{tip}</title></rect>'
        )
    for tick in (0, 50, 100):
        across = left + side * tick / 100
        under = side + strip + bottom + 4
        parts.append(
            f'<text class="tick" x="{left - 5}" y="{12 + side * (1 - tick / 100)}" '
            f'text-anchor="end">{tick}</text>'
            f'<text class="tick" x="{across}" y="{under}" text-anchor="middle">{tick}</text>'
        )
    return Markup("".join([*parts, "</svg>"]))
