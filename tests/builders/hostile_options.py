"""Hostile values of options, derived from their declarations."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any

from matryoshka import cli
from matryoshka.config.flags import CommandParser, FlagParser
from matryoshka.config.mixed import MixedParser
from matryoshka.config.options import Option, default_of, options_of
from matryoshka.training import ssl_options

NUMBERS = (
    *("", " ", "x", "nan", "-nan", "inf", "-inf", "1e308", "-1e308", "1e309", "5e-324", "1e-308"),
    *("-1", "0", "-0.0", "0.5", "1e23", "0x10", "1_0", "1,1", "1\0", "\ud800", "true", "none"),
    *(str(10**10), str(-(10**10)), str(2**31), str(2**32), str(2**63), str(2**64), str(10**30)),
    *("9" * 400, "9" * 5000, "0." + "9" * 5000, "1e" + "9" * 400),
)
TEXTS = (
    *("", " ", "x", "\0", "a\0b", "\ud800", "../..", "..", ".", "a/b", "a\nb", "\x1b[2J", "\u202e"),
    *(
        "-",
        "--",
        "%s%n",
        "${HOME}",
        "~",
        "none",
        "x" * 300,
        "x" * 5000,
        "x" * 100_000,
        "=",
        "[",
        "'",
    ),
)
# Options that decide how long a program runs, and how much memory its images take: their upper ends
# are for the patient.
LONG = (
    *("epochs", "n_epochs", "num_epochs", "steps", "splits", "draws", "minutes", "timeout"),
    *("max_iter", "accumulate", "muon_steps", "knots", "trials", "hiddens", "resolution"),
)


@dataclass(frozen=True)
class Declared:
    """An option of a program. words(text): the words of the command line that give it `text`."""

    program: str
    name: str
    field: Field
    option: Option
    words: Callable[[str], list[str]]

    def after(self, base: list[str], text: str) -> list[str]:
        """A command line: the words of other options, then this one's."""
        if self.field.metadata.get("positional"):
            base = [word for word in base if word.startswith("--")]
        return [*base, *self.words(text)]

    def __str__(self) -> str:
        return f"{self.program} {self.name}"

    @property
    def is_number(self) -> bool:
        return bool({int, float} & set(self.option.items))

    def texts(self) -> list[str]:
        """Hostile texts for it, legal or not."""
        option = self.option
        if not self.is_number:
            texts = list(TEXTS)
            if option.is_tuple:
                texts += [",", ",,,", "x,\0", ",".join("x" * 20_000)]
            return texts
        texts = [*NUMBERS, *map(str, self.outside()), *map(str, self.ends())]
        if not option.is_tuple:
            return texts
        count = 2 if option.any_length else len(option.items)
        lists = []
        for text in texts:
            lists.append(",".join([text] * count))
            lists.append(",".join(["1"] * (count - 1) + [text]))
        return [*lists, "", ",", "[", "[1", ",".join(["1"] * 5000), ",".join(["1"] * (count + 1))]

    def ends(self) -> list[float]:
        """The smallest and largest legal numbers, and the one next to 0."""
        limits = self.option.range
        if int in self.option.items:
            if limits.low is None or limits.high is None:
                return []
            return [int(limits.low), int(limits.high)]
        found = [limits.low, limits.high, 5e-324, 1e-308]
        if limits.above is not None:
            found.append(math.nextafter(limits.above, math.inf))
        if limits.below is not None:
            found.append(math.nextafter(limits.below, -math.inf))
        return [n for n in dict.fromkeys(found) if n is not None and n in limits]

    def outside(self) -> list[float]:
        """The numbers next to the limits that are illegal."""
        limits = self.option.range
        step = 1 if int in self.option.items else None
        found = []
        if limits.low is not None:
            found.append(limits.low - step if step else math.nextafter(limits.low, -math.inf))
        if limits.high is not None:
            found.append(limits.high + step if step else math.nextafter(limits.high, math.inf))
        return [*found, *(n for n in (limits.above, limits.below) if n is not None)]

    def legal_ends(self) -> list[str]:
        """Texts of legal extremes whose runs should end soon."""
        ends = [str(end) for end in self.ends()]
        if self.field.name in LONG:
            ends = ends[:1]
        if not self.option.is_tuple:
            return ends
        count = 1 if self.option.any_length else len(self.option.items)
        lists = [",".join([end] * count) for end in ends]
        if count == 2:
            lists.append(f"{ends[0]},{ends[1]}")
        return lists


def parsers() -> dict[str, Any]:
    """The parser of every program, by its command; those of other repositories by their script."""
    found = {}
    programs = {**cli.PROGRAMS, **{" ".join(words): p for words, p in cli.ROUTES.items()}}
    for name, entry in programs.items():
        module, _, parser = (entry.options or f"{entry.module}:parser").partition(":")
        found[name] = getattr(importlib.import_module(module), parser)()
    for face in ("relic", "moco"):
        found[face] = ssl_options.parser(face)
    return found


@functools.cache
def all_parsers() -> dict[str, Any]:
    """As `parsers`, with one for each command of two words, such as `index build`."""
    found = {}
    for program, parser in parsers().items():
        commands = dict(flag_parsers(program, parser))
        found |= commands if isinstance(parser, CommandParser) else {program: parser}
    return found


def declared() -> list[Declared]:
    """Every option of every program."""
    found = []
    for program, parser in parsers().items():
        for name, flags in flag_parsers(program, parser):
            for key, (field, option) in flags._options.items():
                found.append(Declared(name, key, field, option, flag_words(field, option)))
        for section, group in getattr(parser, "sections", {}).items():
            for key, (field, option) in options_of(group).items():
                label = f"{section}.{key}"
                found.append(Declared(program, label, field, option, section_words(label)))
    return found


def flag_parsers(program: str, parser: Any) -> Iterator[tuple[str, FlagParser]]:
    """(command, parser) of the flags of a program."""
    if isinstance(parser, CommandParser):
        for name in parser._commands:
            yield f"{program} {name}", parser._parser(name)
    elif isinstance(parser, FlagParser):
        yield program, parser
    elif isinstance(parser, MixedParser):
        yield program, parser.flags


def section_words(label: str) -> Callable[[str], list[str]]:
    return lambda text: [f"--{label}={text}"]


def flag_words(field: Field, option: Option) -> Callable[[str], list[str]]:
    if field.metadata.get("positional"):
        return lambda text: ["--", text]
    flag = field.metadata.get("flag") or "--" + field.name.replace("_", "-")
    return lambda text: [f"{flag}={text}"]


def required(parser: Any) -> list[str]:
    """Words for the options that a parser requires."""
    words = []
    if isinstance(parser, FlagParser):
        pairs = [(flag_words(f, o), f, o) for f, o in parser._options.values()]
    elif isinstance(parser, MixedParser):
        pairs = []
    else:
        pairs = []
        for section, group in parser.sections.items():
            for key, (field, option) in options_of(group).items():
                pairs.append((section_words(f"{section}.{key}"), field, option))
    positionals = []
    for spell, field, option in pairs:
        if default_of(field) is not MISSING:
            continue
        text = str(option.choices[0]) if option.choices else "1"
        if field.metadata.get("positional"):
            positionals.append(text)
        else:
            words += spell(text)
    return [*positionals, *words]


def is_legal(option: Option, value: Any) -> bool:
    """Whether a parsed value has its type and lies in its range."""
    if value is None:
        return True
    items = value if option.is_tuple else (value,)
    for item in items:
        if isinstance(item, bool):
            continue
        if isinstance(item, int | float) and not (math.isfinite(item) and item in option.range):
            return False
        if isinstance(item, str | Path) and "\0" in str(item):
            return False
    return True
