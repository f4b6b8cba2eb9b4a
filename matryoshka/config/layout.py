"""Help texts fitted to the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

Row = tuple[str, str]  # (option, explanation); a row without an option is a heading


def help_text(usage: str, rows: Sequence[Row]) -> str:
    """`usage: ...`, then rows in two columns; explanations of several lines keep their breaks."""
    width = max(40, min(shutil.get_terminal_size().columns, 120)) - 1
    longest = max(len(option) for option, _ in rows)
    column = min(4 + longest, width // 2)
    lines = textwrap.wrap(f"usage: {usage}", width)
    for option, text in rows:
        if not option:
            lines.append("")
            for paragraph in text.split("\n"):
                lines += _wrapped(paragraph, width)
            continue
        head = f"  {option}  ".ljust(column)
        lines += textwrap.wrap(
            text, width, initial_indent=head, subsequent_indent=" " * column
        ) or [head.rstrip()]
    return "\n".join(lines)


def _wrapped(paragraph: str, width: int) -> list[str]:
    """A paragraph's lines; an indented one is an example."""
    indent = paragraph[: len(paragraph) - len(paragraph.lstrip())]
    return textwrap.wrap(paragraph, width, subsequent_indent=indent + " " * 4 * bool(indent)) or [
        ""
    ]
