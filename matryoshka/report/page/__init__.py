"""Self-contained HTML report of a model: `render(Evidence(...))`.

The page needs no network and no other file; it has a light theme, a dark theme and a print layout.
page.html is the template, into which style.css and behaviour.js are inserted; sections.py computes
the contents of each section.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka.report.page import sections
from matryoshka.report.run import Run

__all__ = [
    "MAX_BYTES",
    "MAX_IMAGE_BYTES",
    "Answer",
    "Evidence",
    "Neighbour",
    "Neighbours",
    "PageError",
    "Picture",
    "Sample",
    "render",
]

MAX_BYTES = 5_000_000  # of a page: small enough to send by e-mail
MAX_IMAGE_BYTES = 3_600_000  # of all its pictures, in base64


class PageError(ValueError):
    """Evidence that cannot be rendered; the message gives the reason."""

    user_error = True


@dataclass
class Picture:
    """A picture as a data: URL, with its alternative text."""

    address: str
    text: str


class Answer(NamedTuple):
    """Prediction of one prefix for an image. confidence: 0 to 1, NaN if unknown."""

    dim: int
    prediction: str
    confidence: float
    right: bool


@dataclass
class Sample:
    """An evaluated image with its true class.

    outcome: which prefixes are right, in words. answers: one per prefix, shortest first.
    """

    picture: Picture
    label: str
    outcome: str
    answers: list[Answer]


class Neighbour(NamedTuple):
    """An image near another one. same: whether it has the same class, None without classes."""

    picture: Picture
    same: bool | None


@dataclass
class Neighbours:
    """An image, and the images nearest to it with prefixes of each length: (dim, nearest first)."""

    picture: Picture
    label: str
    rows: list[tuple[int, list[Neighbour]]]


@dataclass
class Evidence:
    """Inputs of the page; sections without input are omitted.

    results: results.json of evaluations, the first one is of the model on show (the subject); empty
    for a self-supervised run without an evaluation.
    analysis, baselines, dims: analysis.json, baselines.json, dims.json. run: the training run of
    the subject. environment: env.json of that run. heat_map_layer: a sentence on the layer of the
    heat maps. notes: sentences below the headline.
    """

    title: str
    results: list[dict[str, Any]]
    analysis: dict[str, Any] | None = None
    baselines: dict[str, Any] | None = None
    dims: dict[str, Any] | None = None
    run: Run | None = None
    environment: dict[str, Any] | None = None
    heat_maps: list[Picture] = field(default_factory=list)
    heat_map_layer: str = ""
    samples: list[Sample] = field(default_factory=list)
    neighbours: list[Neighbours] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def render(evidence: Evidence) -> bytes:
    """Render the page as UTF-8.

    Raises PageError if the page exceeds MAX_BYTES or the JSON inputs are malformed.
    """
    from jinja2 import Environment, FileSystemLoader

    here = Path(__file__).parent
    # autoescape: names of classes and files come from users and may contain markup.
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["json"] = _script_safe
    template = environment.get_template("page.html")
    try:
        text = template.render(
            evidence=evidence,
            style=(here / "style.css").read_text(encoding="utf-8"),
            behaviour=(here / "behaviour.js").read_text(encoding="utf-8"),
            **sections.build(evidence),
        )
    # A hand-edited JSON file may lack any key, and fails where that key is used first.
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise PageError(
            f"the JSON files are incomplete or edited ({type(error).__name__}: {error}); "
            "make them again"
        ) from error
    content = text.encode("utf-8", "replace")  # file names may contain bytes that are not UTF-8
    if len(content) > MAX_BYTES:
        raise PageError(
            f"the page would be {len(content):,} bytes, more than {MAX_BYTES:,}; lower --samples"
        )
    return content


def _script_safe(value: Mapping) -> Any:
    """JSON in which no character can close the surrounding <script> element."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
