"""Montages of heat maps: an image beside the heat map, class and confidence of every prefix."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Sizes in inches.
MIN_TILE = 1.85  # side of a heat map
HEAD = 0.24  # line above a picture
LINE = 0.18  # line of text below it
PAD = 0.07  # between a picture and its text
GAP = 0.17  # between pictures
INDENT = 0.1  # more space between the image and the heat maps
MARGIN = 0.16
FOOT = 0.2
MIN_WIDTH = 7.4  # of the figure: the footer needs it
KEY_WIDTH = 0.9  # of the colour key in the footer

# Points.
TEXT, SMALL = 10, 8.5

# By correctness, None if the true class is unknown. Okabe and Ito's blue and vermilion are
# distinguishable with every colour vision deficiency; mark and frame differ as well.
COLOUR = {True: "#0072B2", False: "#D55E00", None: "0.35"}
FRAME: dict[bool | None, str | tuple] = {True: "-", False: (0, (4, 2)), None: "-"}
MARK = {True: "\N{CHECK MARK} ", False: "\N{BALLOT X} ", None: ""}

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


class Cell(NamedTuple):
    """One prefix of a montage. heat: float [H, W], 0 to 1. correct: None if unknown."""

    dim: int
    heat: np.ndarray
    prediction: str
    confidence: float
    correct: bool | None


@dataclass(frozen=True)
class _Layout:
    """Positions of the tiles, in inches from the upper left corner of the figure."""

    rows: int
    columns: int
    side: float  # of a heat map
    cell: float  # height of a heat map with its texts
    image: float  # side of the image
    width: float  # of the figure
    height: float

    def cell_position(self, k: int) -> tuple[float, float]:
        left = MARGIN + self.image + INDENT + GAP
        x = left + (k % self.columns) * (self.side + GAP)
        y = MARGIN + (k // self.columns) * (self.cell + GAP)
        return x, y


def _num_rows(cells: int) -> int:
    if cells <= 4:
        return 1
    if cells <= 12:
        return 2
    return -(-cells // 6)  # six columns


def _side_of_tiles(cells: int) -> float:
    """Side of a heat map: a single row fills the minimum width of the figure."""
    if _num_rows(cells) > 1:
        return MIN_TILE
    room = MIN_WIDTH - 2 * MARGIN - INDENT - cells * GAP
    return max(MIN_TILE, room / (cells + 1))


def _layout_of(captions: Sequence[str]) -> _Layout:
    rows = _num_rows(len(captions))
    columns = -(-len(captions) // rows)
    side = _side_of_tiles(len(captions))
    # In a single row the image has two lines of text below it, so every caption gets as many.
    lines = max(2 if rows == 1 else 1, *(1 + caption.count("\n") for caption in captions))
    cell = HEAD + side + PAD + lines * LINE
    grid = rows * cell + (rows - 1) * GAP
    image = side if rows == 1 else min(grid - HEAD - PAD - 4 * LINE, 2.3 * side)
    return _Layout(
        rows=rows,
        columns=columns,
        side=side,
        cell=cell,
        image=image,
        width=max(2 * MARGIN + image + INDENT + columns * (GAP + side), MIN_WIDTH),
        height=2 * MARGIN + grid + GAP + FOOT,
    )


class _Canvas:
    """A figure addressed in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure  # without pyplot: no global state, no display

        self.width = width
        self.height = height
        self.figure = Figure(figsize=(width, height), dpi=120, facecolor="white")

    def tile(self, x: float, y: float, size: float, pixels: np.ndarray) -> Any:
        """Axes with a square picture."""
        left = x / self.width
        bottom = 1 - (y + size) / self.height
        axes = self.figure.add_axes((left, bottom, size / self.width, size / self.height))
        # small pictures keep their sharp pixels
        interpolation = "nearest" if pixels.shape[0] < 128 else "antialiased"
        axes.imshow(pixels, interpolation=interpolation, aspect="auto")
        axes.set(xticks=[], yticks=[])
        return axes

    def text(self, x: float, y: float, words: str, size: float = TEXT, **options: Any) -> None:
        """Words whose upper left corner is at x, y."""
        options = {"va": "top"} | options
        # parse_math: names may contain dollar signs
        self.figure.text(
            x / self.width, 1 - y / self.height, words, fontsize=size, parse_math=False, **options
        )


def montage(image: np.ndarray, title: str, truth: str, cells: Sequence[Cell], note: str) -> Figure:
    """Draw an image, uint8 [H, W, 3], and beside it the heat map of every prefix.

    Right and wrong predictions differ in mark, colour and frame. title, truth: texts below the
    image. note: what the maps show, in the footer beside the colour key.
    """
    side = _side_of_tiles(len(cells))
    captions = [fit_text(MARK[cell.correct] + cell.prediction, side, TEXT, 2) for cell in cells]
    layout = _layout_of(captions)
    canvas = _Canvas(layout.width, layout.height)
    _draw_image(canvas, layout, image, title, truth)
    grey = image @ LUMA
    for k, (cell, caption) in enumerate(zip(cells, captions, strict=True)):
        _draw_cell(canvas, layout.cell_position(k), side, cell, grey=grey, caption=caption)
    _draw_footer(canvas, note, known=any(cell.correct is not None for cell in cells))
    return canvas.figure


def _draw_image(
    canvas: _Canvas, layout: _Layout, image: np.ndarray, title: str, truth: str
) -> None:
    canvas.text(MARGIN, MARGIN, "image", weight="bold")
    canvas.tile(MARGIN, MARGIN + HEAD, layout.image, image).spines[:].set_color("0.35")
    below = MARGIN + HEAD + layout.image + PAD
    one_row = layout.rows == 1
    name = fit_text(title, layout.image, TEXT, lines=1 if truth and one_row else 2)
    canvas.text(MARGIN, below, name, color="0.35")
    below += LINE * (1 + name.count("\n"))
    canvas.text(MARGIN, below, fit_text(truth, layout.image, TEXT, lines=1 if one_row else 2))


def _draw_cell(
    canvas: _Canvas,
    position: tuple[float, float],
    side: float,
    cell: Cell,
    *,
    grey: np.ndarray,
    caption: str,
) -> None:
    x, y = position
    axes = canvas.tile(x, y + HEAD, side, overlay(grey, cell.heat))
    # matplotlib warns if no part of the contour is inside the map.
    if cell.heat.min() < 0.5 < cell.heat.max():
        axes.contour(cell.heat, levels=[0.5], colors="white", linewidths=1.2)
    if not cell.heat.any():
        axes.text(
            0.5,
            0.5,
            "no positive value\nat this layer",
            transform=axes.transAxes,
            ha="center",
            va="center",
            color="white",
            fontsize=SMALL,
            bbox={"facecolor": "black", "alpha": 0.7, "lw": 0},
        )
    for spine in axes.spines.values():
        spine.set(
            color=COLOUR[cell.correct],
            linewidth=0.8 if cell.correct is None else 2.2,
            linestyle=FRAME[cell.correct],
        )
    canvas.text(x, y, f"prefix {cell.dim}", weight="bold")
    canvas.text(x + side, y, f"{100 * cell.confidence:.0f} %", ha="right")
    canvas.text(x, y + HEAD + side + PAD, caption, color=COLOUR[cell.correct])


def _draw_footer(canvas: _Canvas, note: str, known: bool) -> None:
    """The colour key with `note`, and at the right the frames of right and wrong predictions."""
    from matplotlib.patches import Rectangle

    width, height = canvas.width, canvas.height
    middle = height - MARGIN - FOOT / 2
    bottom = 1 - (middle + 0.07) / height  # of a bar of 0.14 inches
    key = canvas.figure.add_axes((MARGIN / width, bottom, KEY_WIDTH / width, 0.14 / height))
    key.imshow(heat_colours(np.linspace(0, 1, 128))[None], aspect="auto", extent=(0, 1, 0, 1))
    key.axvline(0.5, color="white", linewidth=1.2)
    key.set(xticks=[], yticks=[])

    room = width - 3.2 if known else width - 1.4
    words = fit_text(f"{note}; white line: half of the maximum", room, SMALL)
    style = {"size": SMALL, "va": "center_baseline"}
    canvas.text(MARGIN + KEY_WIDTH + 0.1, middle, words, color="0.25", **style)
    if not known:
        return
    for from_right, correct, word in ((1.75, True, "right"), (0.91, False, "wrong")):
        x = width - from_right
        box = Rectangle(
            (x / width, bottom),
            0.2 / width,
            0.14 / height,
            fill=False,
            lw=1.6,
            edgecolor=COLOUR[correct],
            linestyle=FRAME[correct],
        )
        canvas.figure.add_artist(box)
        canvas.text(x + 0.27, middle, MARK[correct] + word, color=COLOUR[correct], **style)


# ---------------------------------------------------------------- colours


def heat_colours(heat: np.ndarray) -> np.ndarray:
    """float [..., 3] of values 0 to 1: matplotlib's inferno without its darkest part.

    Its lightness grows monotonically, also for readers with colour vision deficiencies.
    """
    from matplotlib import colormaps

    return colormaps["inferno"](0.15 + 0.85 * heat)[..., :3]


def overlay(grey: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """float [H, W, 3], 0 to 1: a heat map over a grey image [H, W] (0 to 255).

    The map is more opaque where it is hotter.
    """
    opacity = (0.2 + 0.4 * heat)[..., None]
    return np.clip((1 - opacity) * (grey / 255)[..., None] + opacity * heat_colours(heat), 0, 1)


# ---------------------------------------------------------------- text


def fit_text(text: str, width: float, size: float, lines: int = 1) -> str:
    """Break a text into at most `lines` lines of `width` inches, between words where possible.

    A text that does not fit ends with an ellipsis. size: of the font, in points.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    measure = TextToPath()
    font = FontProperties(size=size)

    def too_wide(words: str) -> bool:
        measured = measure.get_text_width_height_descent(words, font, ismath=False)[0]
        return measured > 70 * width  # 72 points an inch; hinting may widen glyphs

    def longest(words: str, end: str = "") -> int:
        """Number of characters of `words`, at least one, that fit on a line followed by `end`."""
        lengths = range(2, len(words) + 1)
        return 1 + bisect_left(lengths, True, key=lambda n: too_wide(words[:n] + end))

    shown: list[str] = []
    rest = " ".join(text.split())
    while rest:
        end = longest(rest)
        if end < len(rest) and len(shown) == lines - 1:
            ellipsis = "\N{HORIZONTAL ELLIPSIS}"
            return "\n".join([*shown, rest[: longest(rest, ellipsis)].rstrip() + ellipsis])
        if end < len(rest):
            # Break at the last space; a single word that is too long breaks inside.
            space = rest.rfind(" ", 1, end + 1)
            end = space if space > 0 else end
        shown.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return "\n".join(shown)
