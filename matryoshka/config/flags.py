"""Options as plain flags, as the papers' programs have them: `--path x --mrl --rep_size 64`.

argparse splits the command line; declarations, checks, messages and help are config's, so that an
unknown flag, a bad value and a missing flag are one line each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field
from types import SimpleNamespace
from typing import Any, NoReturn

from matryoshka.config.layout import Row, help_text, remainder, shortened
from matryoshka.config.options import (
    ConfigError,
    Option,
    default_of,
    did_you_mean,
    legible,
    options_of,
    show,
)

HELP: Row = ("-h, --help", "print this text and exit")
METAVARS = {int: "N", float: "X", str: "TEXT"}


def flat_parser(prog: str, description: str, *groups: type, whole_help: bool = False) -> FlagParser:
    """A parser of the options of several dataclasses; field names must differ.

    A field `batch_size` is the flag `--batch-size` unless it declares another one. Booleans are
    switches, tuples are lists with commas. Lines of the description with an indentation of four are
    examples. whole_help: `--help` lists all options, however many there are.
    """
    return FlagParser(prog, description, groups, whole_help)


def command_parser(
    prog: str, description: str, dest: str, commands: Mapping[str, tuple[str, Sequence[type]]]
) -> CommandParser:
    """A parser of subcommands: {name: (help, dataclasses)}; `args.<dest>` is the name."""
    return CommandParser(prog, description, dest, commands)


class FlagParser:
    """See `flat_parser`."""

    def __init__(
        self, prog: str, description: str, groups: Sequence[type], whole_help: bool = False
    ) -> None:
        self.prog = prog
        self._description = description
        self._whole_help = whole_help
        self._options: dict[str, tuple[Field, Option]] = {}
        for group in groups:
            for name, declared in options_of(group).items():
                if name in self._options:
                    raise TypeError(f"{prog}: option {name} is declared twice")
                self._options[name] = declared
        # No abbreviations: a mistyped flag must not select another one.
        self._words = _Words(prog=prog, add_help=False, allow_abbrev=False)
        self._words.add_argument("-h", "--help", action="store_true")
        self._words.add_argument("--help-all", action="store_true")
        for name, (field, option) in self._options.items():
            if not field.metadata.get("positional"):
                short = field.metadata.get("short")
                labels = [_label(field), *([short] if short else [])]
                self._words.add_argument(*labels, dest=name, **_reading(field, option))

    def parse_args(self, argv: Sequence[str] | None = None) -> SimpleNamespace:
        """The typed options. ConfigError, one line, for the first error; `--help` exits."""
        given = self.parse_given(list(sys.argv[1:] if argv is None else argv))
        args = SimpleNamespace()
        for name, (field, _) in self._options.items():
            default = default_of(field)
            if name in given:
                setattr(args, name, given[name])
            elif default is not MISSING:
                setattr(args, name, default)
            else:
                text = field.metadata.get("help", "")
                raise ConfigError(f"{_label(field)} is required" + (f": {text}" if text else ""))
        return args

    def parse_given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The typed options that `argv` gives, without defaults. Errors as of `parse_args`."""
        # Unknown flags and loose words are in `rest`: _loose_words suggests the nearest flag.
        flags, rest = self._words.parse_known_args(argv)
        if flags.help or flags.help_all:
            print(self.help_text(everything=flags.help_all), flush=True)
            raise SystemExit(0)
        words = {name: value for name, value in vars(flags).items() if value is not None}
        del words["help"], words["help_all"]
        words |= self._positionals(self._loose_words(rest))
        given = {}
        for name, (field, option) in self._options.items():
            if name in words:
                given[name] = _typed(field, option, words[name])
        return given

    def _loose_words(self, rest: Sequence[str]) -> list[str]:
        """The words without a flag; ConfigError for an unknown flag among them."""
        words = []
        after_dashes = False  # behind `--`, every word is a value
        for word in rest:
            if word == "--" and not after_dashes:
                after_dashes = True
                continue
            is_number = word[1:2].isdigit()  # -1 is a value, not a flag
            if word.startswith("-") and word != "-" and not (after_dashes or is_number):
                flag = word.partition("=")[0]
                known = [_label(f) for f, _ in self._options.values() if not _is_positional(f)]
                hint = did_you_mean(flag, [*known, "--help"])
                raise ConfigError(f"unknown option {show(flag)}{hint}")
            words.append(word)
        return words

    def _positionals(self, words: list[str]) -> dict[str, Any]:
        """Loose words by option: one each in order; a tuple takes all that are left."""
        given: dict[str, Any] = {}
        for name, (field, option) in self._options.items():
            if not _is_positional(field) or not words:
                continue
            if option.is_tuple:
                given[name] = words
                words = []
            else:
                given[name] = words[0]
                words = words[1:]
        if words:
            raise ConfigError(f"unexpected argument {show(words[0])}")
        return given

    def paths(self, args: SimpleNamespace) -> list[tuple[str, Any]]:
        """(text for messages, path) of the given options that name existing files or folders."""
        found = []
        for name, (field, _) in self._options.items():
            value = getattr(args, name)
            if not field.metadata.get("existing") or value == default_of(field):
                continue
            for path in value if isinstance(value, tuple) else (value,):
                found.append(
                    (str(path) if _is_positional(field) else f"{_label(field)} {path}", path)
                )
        return found

    def help_text(self, everything: bool = False, others: int = 0) -> str:
        """Usage, description and a row for every option, or for the common ones of many.

        others: number of options that `--help-all` lists beside these.
        """
        is_common = {
            name: bool(field.metadata.get("common")) or _is_positional(field)
            for name, (field, _) in self._options.items()
        }
        shown = shortened(is_common, everything or self._whole_help)
        positionals = []
        for field, option in self._options.values():
            if _is_positional(field):
                positionals.append(_label(field) + (" ..." if option.is_tuple else ""))
        heading = "arguments and options" if positionals else "options"
        rows = [("", self._description.strip()), ("", heading)]
        rows += [_row(*self._options[name]) for name in self._options if name in shown]
        rows += [HELP]
        if len(shown) < len(self._options) or (others and not everything):
            rows += remainder(len(self._options) + others)
        return help_text(" ".join([self.prog, *positionals, "[options]"]), rows)


class CommandParser:
    """See `command_parser`."""

    def __init__(
        self,
        prog: str,
        description: str,
        dest: str,
        commands: Mapping[str, tuple[str, Sequence[type]]],
    ) -> None:
        self._prog = prog
        self._description = description
        self._dest = dest
        self._commands = commands

    def parse_args(self, argv: Sequence[str] | None = None) -> SimpleNamespace:
        """The typed options of the subcommand that the first word names."""
        argv = list(sys.argv[1:] if argv is None else argv)
        names = ", ".join(self._commands)
        if argv[:1] in (["-h"], ["--help"], ["--help-all"]):
            print(self.help_text(everything=argv[0] == "--help-all"), flush=True)
            raise SystemExit(0)
        if not argv:
            raise ConfigError(f"{self._dest} is required: one of {names}")
        name, rest = argv[0], argv[1:]
        if name not in self._commands:
            hint = did_you_mean(name, list(self._commands))
            raise ConfigError(f"{self._dest} {show(name)}: expected one of {names}{hint}")
        args = self._parser(name).parse_args(rest)
        setattr(args, self._dest, name)
        return args

    def _parser(self, name: str) -> FlagParser:
        text, groups = self._commands[name]
        return FlagParser(f"{self._prog} {name}", text, groups)

    def paths(self, args: SimpleNamespace) -> list[tuple[str, Any]]:
        """As `FlagParser.paths`."""
        return self._parser(getattr(args, self._dest)).paths(args)

    def help_text(self, everything: bool = False) -> str:
        """Usage, description and a row for every subcommand; with `everything`, their options."""
        rows = [("", self._description.strip()), ("", f"{self._dest}s")]
        rows += [(name, text) for name, (text, _) in self._commands.items()]
        usage = f"{self._prog} {self._dest.upper()} [options]      (--help after it lists them)"
        texts = [help_text(usage, [*rows, HELP])]
        if everything:
            texts += [self._parser(name).help_text(everything=True) for name in self._commands]
        return "\n\n".join(texts)


class _Words(argparse.ArgumentParser):
    """Splits a command line into flags and values; errors are ConfigErrors."""

    def error(self, message: str) -> NoReturn:
        # argparse's text is "argument --path: expected one argument".
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        if problem.startswith("expected"):
            raise ConfigError(f"{flag}: a value is missing")
        if problem.startswith("ignored explicit argument"):
            raise ConfigError(f"{flag} is a switch: it takes no value")
        raise ConfigError(message)


def _is_positional(field: Field) -> bool:
    return bool(field.metadata.get("positional"))


def _label(field: Field) -> str:
    """What messages call an option: its flag, or a positional argument's metavar."""
    if _is_positional(field):
        return field.metadata.get("metavar") or field.name.upper()
    return field.metadata.get("flag") or "--" + field.name.replace("_", "-")


def _reading(field: Field, option: Option) -> dict[str, Any]:
    """argparse's keywords for a flag."""
    # Default None, not False: only flags that were given count.
    if option.items == (bool,) and not option.is_tuple:
        return {"action": "store_true", "default": None}
    if field.metadata.get("repeat"):
        return {"action": "append"}
    if field.metadata.get("words"):
        return {"nargs": "+"}
    return {}


def _typed(field: Field, option: Option, value: Any) -> Any:
    """A value from the command line in its type. ConfigError names the flag, value and range."""
    if isinstance(value, list) and (not value or [] in value):  # argparse's reading of `--flag=--`
        raise ConfigError(f"{_label(field)}: a value is missing")
    try:
        return option.check_flag(value)
    except ValueError as error:
        text = value if isinstance(value, str) else " ".join(value)
        raise ConfigError(f"{_label(field)} {legible(text)}: {error}") from None


def _row(field: Field, option: Option) -> Row:
    """The help of one option."""
    head, kind = _label(field), option.items[0]
    if field.metadata.get("short"):
        head = f"{field.metadata['short']}, {head}"
    is_switch = kind is bool and not option.is_tuple
    if not _is_positional(field) and not is_switch:
        metavar = field.metadata.get("metavar") or METAVARS.get(kind, "FILE")
        if option.is_tuple and not field.metadata.get("metavar"):
            metavar = f"{metavar},..."
        head = f"{head} {metavar}"
    default = default_of(field)
    facts = []
    if default is MISSING:
        facts.append("required")
    elif not is_switch and default not in (None, "", ()):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        facts.append(f"default {shown}")
    facts += option.facts()
    text = field.metadata.get("help", "")
    return head, f"{text} [{'; '.join(facts)}]".strip() if facts else text
