"""Declarations of options: type, legal range and choices, checked in one place.

`option` declares a dataclass field. Annotations: int, float (finite), str, bool, Path,
`tuple[int, ...]`, `tuple[float, float]` and similar, and each of these `| None`; the words none and
null and an empty text then mean None.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from fastargs.validation import Checker

TRUE = ("true", "1", "yes", "on")
FALSE = ("false", "0", "no", "off")
AUTO = ("auto", "1", "0")  # choices of a switch that may also be left to the program
NONE = ("none", "null", "")
MAX_NAME_BYTES = 200  # file systems allow 255 bytes; the rest is for suffixes
MAX_TEXT = 4096  # characters: PATH_MAX of Linux

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
show = _short.repr  # one line of bounded length, also for hostile text from a file


def legible(text: str) -> str:
    """`text` itself where it is a line of bounded length, else as `show` has it."""
    return text if text.isprintable() and 0 < len(text) <= _short.maxstring else show(text)


class ConfigError(ValueError):
    """Unusable options; the message has one line per error."""

    user_error = True


class OutOfRange(ValueError):
    """A value of the right type outside its legal range. value: the typed value."""

    def __init__(self, value: object, reason: str) -> None:
        super().__init__(reason)
        self.value = value


def option(
    default: Any = MISSING,
    *,
    help: str = "",
    factory: Any = MISSING,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    nonempty: bool = False,
    choices: Iterable[object] = (),
    check: Callable[[Any], None] | None = None,
    affects_result: bool = True,
    common: bool = False,
    existing: bool = False,
    file_name: bool = False,
    flag: str | None = None,
    short: str | None = None,
    metavar: str | None = None,
    positional: bool = False,
    words: bool = False,
    repeat: bool = False,
) -> Any:
    """Declare a dataclass field; an option without a default is required.

    low, high: inclusive limits; above, below: exclusive ones; of a tuple, for each item.
    nonempty: a tuple needs an item. choices: the legal values, or a tuple's legal items.
    check: value -> None, raises ValueError(reason).
    affects_result: False for options that decide where and how fast a program runs, not what it
    computes; a resumed run may change them.
    common: listed by `--help` where there are too many options to list all.
    existing: names a file or folder, which `check_first` looks for; `torchvision:resnet50` and the
    like are not paths. file_name: names a file, a folder or a row, whose bytes need not be text;
    existing implies it.

    For `flat_parser` alone: flag, default `--name-with-dashes`; short, such as `-r`; metavar;
    positional: an argument without a flag; words: a flag with several values; repeat: a flag that
    may be given repeatedly.
    """
    metadata = {
        "help": help,
        "range": Range(low=low, high=high, above=above, below=below),
        "nonempty": nonempty,
        "choices": tuple(choices),
        "check": check,
        "affects_result": affects_result,
        "common": common,
        "existing": existing,
        "file_name": file_name or existing,
        "flag": flag,
        "short": short,
        "metavar": metavar,
        "positional": positional,
        "words": words,
        "repeat": repeat,
    }
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Range:
    """Limits of a number: low and high inclusive, above and below exclusive."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, number: Any) -> bool:
        return (
            (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """`1 or more`, `0 to 1`, `more than 0, at most 1`; empty without limits."""
        if self.low is not None and self.high is not None:
            return f"{_number(self.low)} to {_number(self.high)}"
        lower = upper = ""
        if self.low is not None:
            lower = f"{_number(self.low)} or more"
        elif self.above is not None:
            lower = f"more than {_number(self.above)}"
        if self.high is not None:
            upper = f"at most {_number(self.high)}"
        elif self.below is not None:
            upper = f"less than {_number(self.below)}"
        return ", ".join(part for part in (lower, upper) if part)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


class Option(Checker):
    """fastargs checker of one field: annotation, then choices, range and the field's own check."""

    def __init__(self, annotation: Any, metadata: Mapping[str, Any]) -> None:
        # `| None` makes a union of every annotation, whose members get_args lists.
        kinds = [kind for kind in get_args(annotation | None) if kind is not NoneType]
        self.optional = NoneType in get_args(annotation)
        self.is_tuple = get_origin(kinds[0]) is tuple
        items = get_args(kinds[0]) if self.is_tuple else tuple(kinds)
        self.any_length = items[-1] is Ellipsis
        self.items: tuple[type, ...] = items[:1] if self.any_length else items
        if len(kinds) > 1 or not {int, float, str, bool, Path}.issuperset(self.items):
            raise TypeError(f"unsupported annotation {annotation} ({metadata.get('help')})")
        self.choices: tuple[object, ...] = tuple(metadata.get("choices", ()))
        self.range: Range = metadata.get("range", Range())
        self.nonempty: bool = metadata.get("nonempty", False)
        self.rule: Callable[[Any], None] | None = metadata.get("check")
        self.file_name: bool = metadata.get("file_name", False)

    def kind(self) -> str:
        """The type: `int`, `float,float`, `int,...`."""
        text = ",".join(item.__name__ for item in self.items)
        return f"{text},..." if self.any_length else text

    def help(self) -> str:
        """The type with its words for None: `int,... or none`."""
        return f"{self.kind()} or none" if self.optional else self.kind()

    def facts(self) -> list[str]:
        """Choices and range, for the help text."""
        facts = []
        if self.choices:
            facts.append(f"one of {', '.join(str(choice) for choice in self.choices)}")
        if str(self.range):
            facts.append(str(self.range))
        return facts

    def check(self, value: object) -> object:
        """The typed value. ValueError whose text is the reason; OutOfRange for a number."""
        word = str(value).strip().lower()
        if self.optional and word in NONE:
            return None
        is_switch = {"1", "0"}.issubset(self.choices)  # with further words, such as AUTO
        if is_switch and word in TRUE + FALSE:  # yaml's true is a bool, not text
            value = "1" if word in TRUE else "0"
        return self._typed(value, self.help())

    def check_flag(self, value: object) -> object:
        """`check` for a flag. None means that the flag is left out: `--title none` is a title."""
        return self._typed(value, self.kind())

    def _typed(self, value: object, expected: str) -> object:
        try:
            typed = self._tuple(value) if self.is_tuple else _scalar(self.items[0], value)
        except (ValueError, OverflowError):
            raise ValueError(f"expected {expected}") from None
        self.check_typed(typed)
        return typed

    def check_typed(self, typed: Any) -> None:
        """Check a value that already has its type, such as an attribute of a dataclass."""
        if typed is None:
            return
        items = typed if self.is_tuple else (typed,)
        if self.nonempty and not items:
            facts = ", each ".join(["expected one or more values", *self.facts()])
            raise OutOfRange(list(items), facts)
        for item in items:
            if isinstance(item, str | Path):
                check_text(str(item), file_name=self.file_name)
            if self.choices and item not in self.choices:
                names = [str(choice) for choice in self.choices]
                hint = did_you_mean(str(item), names)
                if self.is_tuple:
                    raise ValueError(f"{item!r} is unknown; known: {', '.join(names)}{hint}")
                raise ValueError(f"expected one of {', '.join(names)}{hint}")
            if item not in self.range:
                shown = list(items) if self.is_tuple else item
                raise OutOfRange(shown, f"expected {self.range}")
        if self.rule is not None:
            self.rule(typed)

    def _tuple(self, value: object) -> tuple[object, ...]:
        if isinstance(value, str):
            text = value.strip().removeprefix("[").removesuffix("]").strip()
            value = [part.strip() for part in text.split(",")] if text else []
        # Not isinstance: a mapping in a file is a subclass of list (files._Pairs).
        if type(value) not in (list, tuple):
            raise ValueError
        assert isinstance(value, list | tuple)
        kinds = self.items * len(value) if self.any_length else self.items
        return tuple(_scalar(kind, item) for kind, item in zip(kinds, value, strict=True))


def _scalar(kind: type, value: Any) -> object:
    """`value`, text or already typed, as an int, float, str, bool or Path; else ValueError."""
    # Strict types: int(2.7), float(True) and bool("False") would hide a mistake in a file.
    if kind is bool:
        word = str(value).lower()
        if word in TRUE + FALSE:
            return word in TRUE
    if kind is str and isinstance(value, str):
        return value
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is int and type(value) in (int, str):  # a bool is an int to Python only
        return int(value)
    if kind is float and type(value) in (int, float, str):
        number = float(value)
        if math.isfinite(number):
            return number
    raise ValueError


def options_of(section: type) -> dict[str, tuple[Field, Option]]:
    """{name: (field, checker)} of a dataclass, in order of declaration."""
    hints = get_type_hints(section)  # annotations are text: `from __future__ import annotations`
    declared = {}
    for declaration in fields(section):
        checker = Option(hints[declaration.name], declaration.metadata)
        declared[declaration.name] = (declaration, checker)
    return declared


def default_of(declaration: Field) -> Any:
    """The default of a field; MISSING for a required one."""
    if declaration.default_factory is MISSING:
        return declaration.default
    return declaration.default_factory()


def check_fields(instance: Any, section: str = "") -> None:
    """ValueError for the first value outside its declared range or choices.

    For dataclasses that are also constructed in Python, where no parser has checked them.
    """
    for name, (_, checker) in options_of(type(instance)).items():
        value = getattr(instance, name)
        try:
            checker.check_typed(value)
        except ValueError as error:
            prefix = f"{section}." if section else ""
            raise ValueError(f"{prefix}{name}={value}: {error}") from None


def check_text(text: str, *, file_name: bool = False) -> None:
    """ValueError for a text that no option takes.

    file_name: bytes that are not UTF-8 are legal. Python has them as lone surrogates, which
    neither a log nor a model file can hold as text.
    """
    if "\0" in text:
        raise ValueError("expected text without NUL characters")
    if len(text) > MAX_TEXT:
        raise ValueError(f"expected at most {MAX_TEXT} characters")
    if not file_name and not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("expected text in UTF-8")


def check_name(name: str) -> None:
    """ValueError for a text that cannot be the name of one file or folder, such as a run id."""
    usable = (
        name != ""
        and name.isprintable()
        and not name.startswith(".")  # hidden files, `.` and `..`
        and not set(name) & set("/\\")
        and len(name.encode()) <= MAX_NAME_BYTES
    )
    if not usable:
        raise ValueError(
            "expected a name for a file: no / or \\, no leading dot, "
            f"1 to {MAX_NAME_BYTES} bytes of printable text"
        )


def did_you_mean(word: str, names: Collection[str]) -> str:
    """` (did you mean 'x'?)` for the closest name, or one with the same last part; else empty."""
    # Cut to 100 characters: the comparison takes quadratic time, and a file may hold any text.
    close = get_close_matches(word[:100], names, 1, 0.8)
    if not close:
        last = "." + word.rpartition(".")[2]
        close = [name for name in names if name.endswith(last)]
    return f" (did you mean {close[0]!r}?)" if close else ""
