"""Flags and sections on one command line: `--net vit --lr 1e-4 --training.ema=0.999`.

For programs that keep the flags of other repositories. A flag is another spelling of options in
sections: it is translated to them, and everything after the parser sees sections alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, NamedTuple

from matryoshka.config.flags import FlagParser
from matryoshka.config.sections import (
    Defaults,
    SectionParser,
    read,
    section_parser,
)

# (the given flags, options that files and sections give) -> {section.option: value}
Translate = Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]

_SECTION_SWITCHES = ("--print-config",)
_FILES = ("--config-file", "-C")


class MixedParser(NamedTuple):
    """flags: a parser whose options are all optional. translate: its given flags as options of
    sections, which win over config files; `--section.option=value` wins over both. defaults: see
    `sections.read`.
    """

    sections: Mapping[str, type]
    flags: FlagParser
    translate: Translate
    defaults: Defaults

    def parse_args(self, argv: Sequence[str] | None = None) -> SimpleNamespace:
        """One instance of each section; `--help` and `--print-config` print and exit."""
        flag_words, section_words = _divided(sys.argv[1:] if argv is None else argv)
        if {"-h", "--help", "--help-all"} & set(flag_words):
            print(self.help_text(everything="--help-all" in flag_words), flush=True)
            raise SystemExit(0)
        given = self.flags.parse_given(flag_words)

        def translated(others: Mapping[str, Any]) -> list[str]:
            options = self.translate(given, others)
            return [f"--{key}={_text(value)}" for key, value in options.items()]

        return read(self.sections, section_words, defaults=self.defaults, translated=translated)

    def paths(self, args: SimpleNamespace) -> list[tuple[str, Any]]:
        """(text for messages, path) of the given options that name existing files or folders."""
        return self._sections_alone().paths(args)

    def help_text(self, everything: bool = False) -> str:
        """The common flags; with `everything`, all flags and the options of the sections."""
        count = sum(len(fields(section)) for section in self.sections.values())
        text = self.flags.help_text(everything, others=count)
        if everything:
            text += f"\n\n{self._sections_alone().help_text(everything=True)}"
        return text

    def _sections_alone(self) -> SectionParser:
        return section_parser(self.flags.prog, "The same options, in sections.", self.sections)


def _divided(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of flags, and those of options in sections with their values."""
    flags: list[str] = []
    sections: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        in_section = name.startswith("--") and "." in name
        if not in_section and name not in (*_FILES, *_SECTION_SWITCHES):
            flags.append(word)
            continue
        sections.append(word)
        takes_value = not equals and word not in _SECTION_SWITCHES
        if takes_value and words and not words[0].startswith("-"):
            sections.append(words.pop(0))
    return flags, sections


def _text(value: Any) -> str:
    """A typed value as the command line spells it."""
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    if isinstance(value, bool):
        return str(int(value))
    return "none" if value is None else str(value)
