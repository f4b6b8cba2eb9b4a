"""A first look at a command line, before a program imports torch.

Importing torch takes two seconds. A program that is started as a script calls `check_first` between
its light imports and the others, so that `--help`, a mistyped option and a missing file are
answered at once:

    from matryoshka.training.options import parser

    if __name__ == "__main__":
        check_first(parser())

    import torch
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from matryoshka.config.options import ConfigError
from matryoshka.config.outcome import program
from matryoshka.config.sections import names_a_pipe
from matryoshka.interrupts import quit_on_interrupt

_PUBLISHED = re.compile(r"[a-z-]{2,}:")  # torchvision:NAME, timm:NAME; one letter is a drive


class Parser(Protocol):
    """A FlagParser, CommandParser or SectionParser."""

    def parse_args(self, argv: Sequence[str] | None = None) -> SimpleNamespace: ...
    def paths(self, args: SimpleNamespace) -> list[tuple[str, Any]]: ...


def check_first(parser: Parser, argv: Sequence[str] | None = None) -> None:
    """Exit as the program itself would for `--help`, a mistake in the options or a missing file.

    argv: default sys.argv[1:]. The program parses the options again. A config file from a pipe can
    be read only once, so nothing is checked then. Where a script is started, which gives no argv,
    an interrupt during the imports that follow ends it in one line.
    """
    _check(parser, sys.argv[1:] if argv is None else argv)
    if argv is None:
        quit_on_interrupt()


@program
def _check(parser: Parser, argv: Sequence[str]) -> None:
    if names_a_pipe(argv):
        return
    for text, path in parser.paths(parser.parse_args(argv)):
        if not _PUBLISHED.match(str(path)) and not os.path.exists(path):
            raise ConfigError(f"{text}: no such file or folder")
