"""One HTML file that shows a model: `render(Evidence(...))`. No network, no other file; light, dark
and on paper.

page.html is the frame, style.css and behaviour.js go into it; sections.py turns numbers into what
it shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka.report.page import sections
from matryoshka.report.tables import Run

__all__ = [
    "MAX_BYTES",
    "MAX_IMAGE_BYTES",
    "Answer",
    "Evidence",
    "PageError",
    "Picture",
    "Sample",
    "render",
]

MAX_BYTES = 5_000_000  # of a page: it should go by mail
MAX_IMAGE_BYTES = 3_600_000  # of its pictures, in base64


class PageError(ValueError):
    """Evidence that does not make a page; the message says why."""

    user_error = True


@dataclass
class Picture:
    """A picture as a data: address, with its text."""

    address: str
    text: str


class Answer(NamedTuple):
    """What a prefix says of an image. confidence: 0 to 1, NaN where it is not known."""

    dim: int
    said: str
    confidence: float
    right: bool


@dataclass
class Sample:
    """An image that was evaluated; answers from the shortest prefix on."""

    picture: Picture
    label: str
    story: str
    answers: list[Answer]


@dataclass
class Evidence:
    """All that a page may show; what is missing is left out.

    results: results.json of evaluations, the first is the subject. analysis, baselines:
    analysis.json, baselines.json. run: the subject's training. environment: env.json of that run.
    """

    title: str
    results: list[dict[str, Any]]
    analysis: dict[str, Any] | None = None
    baselines: dict[str, Any] | None = None
    run: Run | None = None
    environment: dict[str, Any] | None = None
    heat_maps: list[Picture] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def render(evidence: Evidence) -> bytes:
    """The page, UTF-8. PageError when it would be larger than MAX_BYTES, or the evidence is not
    what it should be.
    """
    from jinja2 import Environment, FileSystemLoader

    here = Path(__file__).parent
    # autoescape: names of classes and files come from users
    page = Environment(
        loader=FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page.filters["json"] = _script_safe
    template = page.get_template("page.html")
    files = {
        name: (here / name).read_text(encoding="utf-8") for name in ("style.css", "behaviour.js")
    }
    try:  # files that somebody edited miss anything, anywhere
        text = template.render(
            evidence=evidence,
            style=files["style.css"],
            behaviour=files["behaviour.js"],
            **sections.build(evidence),
        )
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise PageError(
            f"the JSON files do not hold what their programs write ({type(error).__name__}: "
            f"{error}); make them again"
        ) from error
    content = text.encode("utf-8", "replace")  # names of files may be no text
    if len(content) > MAX_BYTES:
        raise PageError(
            f"the page would have {len(content):,} bytes, more than {MAX_BYTES:,}; lower --samples"
        )
    return content


def _script_safe(value: Mapping) -> Any:
    """JSON that cannot end the <script> around it."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
