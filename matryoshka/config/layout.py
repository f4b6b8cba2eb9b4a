"""Help texts fitted to the terminal."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence

Row = tuple[str, str]  # (option, explanation); a row without an option is a heading
EXAMPLE = 4  # indentation of an example's command


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


def _wrapped(line: str, width: int) -> list[str]:
    """A line of a description, wrapped with the indentation that its kind needs."""
    indent = len(line) - len(line.lstrip())
    row = re.match(r"\S+(, \S+)*\s{2,}(?=\S)", line)
    if row is not None:
        hanging = row.end()  # a row of a table: below its second column
    elif indent == EXAMPLE:
        hanging = 2 * EXAMPLE
    else:
        hanging = indent
    return textwrap.wrap(line, width, subsequent_indent=" " * hanging) or [""]
