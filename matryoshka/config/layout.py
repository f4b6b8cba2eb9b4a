"""Help texts fitted to the terminal."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence

Row = tuple[str, str]  # (option, explanation); a row without an option is a heading
EXAMPLE = 4  # indentation of an example's command; its further lines have more
SHORT = 15  # options that `--help` lists all; of more, the common ones
TABLE_ROW = r"\S+(, \S+)*\s{2,}(?=\S)"  # a name, and its explanation behind two spaces


def help_text(usage: str, rows: Sequence[Row]) -> str:
    """`usage: ...`, then rows in two columns; explanations of several lines keep their breaks."""
    width = max(40, min(shutil.get_terminal_size().columns, 120)) - 1
    longest = max(len(option) for option, _ in rows)
    column = min(4 + longest, width // 2)
    lines = textwrap.wrap(f"usage: {usage}", width)
    for option, text in rows:
        if not option:
            lines.append("")
            for line in _joined(text):
                lines += _wrapped(line, width)
            continue
        head = f"  {option}  ".ljust(column)
        lines += textwrap.wrap(
            text, width, initial_indent=head, subsequent_indent=" " * column
        ) or [head.rstrip()]
    return "\n".join(lines)


def shortened(options: Mapping[str, bool], everything: bool) -> set[str]:
    """The names of `options` (name: whether it is common) that a help text lists."""
    few = len(options) <= SHORT
    return {name for name, common in options.items() if common or few or everything}


def remainder(count: int) -> list[Row]:
    """The last line of a help text that lists only some of `count` options."""
    return [("", f"--help-all lists all {count} options.")]


def _joined(text: str) -> list[str]:
    """The lines of a description, with those of a paragraph, or of a table's row, joined to one."""
    lines = [""]
    for line in text.split("\n"):
        previous = lines[-1]
        in_table = re.match(TABLE_ROW, previous) is not None
        if in_table:
            continues = line.startswith(" " * (EXAMPLE + 1))
        else:
            is_text = bool(line) and not line.startswith(" ") and not re.match(TABLE_ROW, line)
            continues = is_text and bool(previous) and not previous.startswith(" ")
        if continues:
            lines[-1] = f"{previous} {line.strip()}"
        else:
            lines.append(line)
    return lines[1:]


def _wrapped(line: str, width: int) -> list[str]:
    """A line of a description, wrapped with the indentation that its kind needs."""
    indent = len(line) - len(line.lstrip())
    if indent >= EXAMPLE:
        return [line]  # of a command, which must stay as it is to be copied
    row = re.match(TABLE_ROW, line)
    hanging = row.end() if row is not None else indent  # below the second column of a table
    return textwrap.wrap(line, width, subsequent_indent=" " * hanging) or [""]
