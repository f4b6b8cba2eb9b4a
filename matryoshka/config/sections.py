"""Options in sections: `--config-file x.yaml`, `--section.option=value`.

The syntax is that of fastargs, which holds the declarations. The reading is ours, because fastargs
1.2.0 ignores unknown options, turns `False` into true, lets the environment win and exits with
status 0 on errors. Here later wins over earlier, and the command line over files.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import fastargs
import yaml

from matryoshka.config.files import Given, read_file
from matryoshka.config.layout import help_text, remainder, shortened
from matryoshka.config.options import (
    ConfigError,
    OutOfRange,
    default_of,
    did_you_mean,
    legible,
    options_of,
    show,
)

_COMMAND_LINE = "on the command line"
_SWITCHES = ("help", "help-all", "print-config")


# {section.option: value, as it was given} -> {section.option: value}
Defaults = Callable[[Mapping[str, Any]], Mapping[str, Any]]
Translated = Callable[[Mapping[str, Any]], Sequence[str]]


class ShortForm(NamedTuple):
    """A command line of words alone, such as `write PHOTOS OUT.beton`.

    words: the option that each word is, and its name in the usage. defaults: values that replace
    the declared defaults where this form is used; files and options win over them.
    """

    words: Mapping[str, str]
    defaults: Mapping[str, object]


class SectionParser(NamedTuple):
    """The options of one program in sections; `parse_args(argv)` calls `read` with them."""

    sections: Mapping[str, type]
    prog: str
    description: str
    short_form: ShortForm | None = None

    def parse_args(self, argv: Sequence[str] | None = None) -> SimpleNamespace:
        """One instance of each section; see `read`."""
        return read(
            self.sections,
            argv,
            prog=self.prog,
            description=self.description,
            short_form=self.short_form,
        )

    def paths(self, args: SimpleNamespace) -> list[tuple[str, Any]]:
        """(text for messages, path) of the given options that name existing files or folders."""
        found = []
        for name in self.sections:
            section = getattr(args, name)
            for field in fields(section):
                value = getattr(section, field.name)
                if field.metadata.get("existing") and value != default_of(field):
                    found.append((f"{name}.{field.name}={value}", value))
        return found

    def help_text(self, everything: bool = False) -> str:
        """Usage, description and options: all, or the common ones of many."""
        return _help(self, _declare(self.sections), everything)


def section_parser(
    prog: str,
    description: str,
    sections: Mapping[str, type],
    short_form: ShortForm | None = None,
) -> SectionParser:
    """A parser of sections, the counterpart of `flat_parser`."""
    return SectionParser(sections, prog, description, short_form)


def read(
    sections: Mapping[str, type],
    argv: Sequence[str] | None = None,
    *,
    prog: str = "",
    description: str = "",
    short_form: ShortForm | None = None,
    defaults: Defaults | None = None,
    translated: Translated | None = None,
) -> SimpleNamespace:
    """One instance of each section's dataclass, from config files and `argv`.

    translated: gives further words, such as ["--lr.lr=0.1"], from the options that files and `argv`
    give; they win over files, `argv` wins over them.

    defaults: maps the options that files and command line give to values of others, which win over
    the declared defaults.

    argv: default sys.argv[1:]. A relative config file is looked up in the current folder, then in
    the repository's root, then among the configs installed with the package. `--help`, `--help-all`
    and `--print-config` print and raise SystemExit(0). ConfigError lists all errors: unknown and
    missing options, values of the wrong type or out of range, unreadable files. A ValueError from a
    section's `__post_init__` is reported the same way.
    """
    declared = _declare(sections)
    params = {".".join(path): param for path, param in declared.entries.items()}
    # All errors are collected: a user corrects them in one go.
    errors: list[str] = []
    argv = sys.argv[1:] if argv is None else argv
    command = _split(argv, params, errors, takes_words=short_form is not None)
    switches = command.switches
    if switches & {"help", "help-all"}:
        parser = SectionParser(sections, prog or Path(sys.argv[0]).name, description, short_form)
        print(_help(parser, declared, "help-all" in switches), flush=True)
        raise SystemExit(0)

    # Later files win over earlier ones, and the command line over all of them.
    words = _named_words(command, short_form)
    given = Given()
    if words and short_form is not None:
        given |= {key: (value, "by default") for key, value in short_form.defaults.items()}
    for name in command.files:
        given |= read_file(name, params, errors)
    if translated is not None:
        more = translated(_legal(given | words | command.given, params))
        given |= _split(more, params, errors, takes_words=False).given
    given |= words | command.given
    if defaults is not None:
        values = defaults(_legal(given, params))
        given = Given({key: (value, "by default") for key, value in values.items()}) | given
    config = SimpleNamespace()
    for name, section in sections.items():
        before = len(errors)
        values = _values(name, section, params, given, errors)
        if len(errors) == before:
            try:
                setattr(config, name, section(**values))
            except ValueError as error:
                # Most messages of a section name it already, as section.option=value.
                text = str(error)
                errors.append(text if text.startswith(f"{name}.") else f"{name}: {text}")
    if errors:
        raise ConfigError("\n".join(errors))
    if "print-config" in switches:
        sources = {key: source for key, (_, source) in given.items()}
        print(to_yaml(config, sources), end="", flush=True)
        raise SystemExit(0)
    return config


def _legal(given: Given, params: Mapping[str, fastargs.Param]) -> dict[str, object]:
    """{option: value as written}, without values that `_values` will refuse: functions that derive
    options from others need not expect them.
    """
    found = {}
    for key, (value, _) in given.items():
        try:
            params[key].checker.check(value)
        except ValueError:
            continue
        found[key] = value
    return found


def _values(
    name: str,
    section: type,
    params: Mapping[str, fastargs.Param],
    given: Given,
    errors: list[str],
) -> dict[str, Any]:
    """The typed values of one section; errors are appended to `errors`."""
    values = {}
    for field in fields(section):
        key = f"{name}.{field.name}"
        param = params[key]
        if param.required and key not in given:
            errors.append(
                f"{key} is required: {param.desc}" if param.desc else f"{key} is required"
            )
            continue
        value, source = given.get(key, (param.default, "by default"))
        try:
            values[field.name] = param.checker.check(value)
        except OutOfRange as error:
            # The source only where the user does not see the value: in a file, or a default.
            shown_source = "" if source == _COMMAND_LINE else f" {source}"
            number = legible(str(error.value).removesuffix(".0"))
            errors.append(f"{key}={number}{shown_source}: {error}")
        except ValueError as error:
            errors.append(f"{key}={show(value)} {source}: {error}")
    return values


def _declare(sections: Mapping[str, type]) -> fastargs.Config:
    """A fastargs.Config of these sections alone; fastargs' own is global to the process."""
    declared = fastargs.Config()
    for name, section in sections.items():
        params = {}
        for field, checker in options_of(section).values():
            default = default_of(field)
            required = default is MISSING
            params[field.name] = fastargs.Param(
                checker, field.metadata.get("help", ""), None if required else default, required
            )
        fastargs.Section(name, config_descriptor=declared).params(**params)
    return declared


class _CommandLine(NamedTuple):
    """Config files, options, switches (help, help-all, print-config), and words without an option
    before them.
    """

    files: list[str]
    given: Given
    switches: set[str]
    words: list[str]


def _split(
    argv: Sequence[str], names: Collection[str], errors: list[str], takes_words: bool = False
) -> _CommandLine:
    """The parts of a command line; errors are appended to `errors`."""
    files, given, switches, words = line = _CommandLine([], Given(), set(), [])
    known = [*names, "config-file"]
    short = {"-h": "--help", "-C": "--config-file"}
    waiting = [short.get(word, word) for word in reversed(argv)]  # a stack: pop is the next word
    while waiting:
        word = waiting.pop()
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and word[2:] in _SWITCHES:
            switches.add(key)
            continue
        # `--option value`: the next word is the value unless it is an option itself.
        if word.startswith("--") and not equals and waiting and not waiting[-1].startswith("--"):
            equals, value = "=", waiting.pop()
        if not word.startswith("--") and takes_words:
            words.append(word)
        elif not word.startswith("--"):
            errors.append(f"unexpected argument {show(word)} {_COMMAND_LINE}")
        elif key not in known:
            hint = did_you_mean(key, [*known, *_SWITCHES])
            errors.append(f"unknown option {show(key)} {_COMMAND_LINE}{hint}")
        elif not equals or (key == "config-file" and not value):
            errors.append(f"{key} {_COMMAND_LINE}: a value is missing")
        elif key == "config-file":
            files.append(value)
        else:
            given[key] = value, _COMMAND_LINE
    return line


def _named_words(command: _CommandLine, short_form: ShortForm | None) -> Given:
    """The words of a command line by their option. ConfigError, alone: other errors may follow
    from it.
    """
    words = command.words
    if short_form is None or not words:
        return {}
    expected = " ".join(short_form.words.values())
    shown = " ".join(map(show, words))
    both = [f"--{key}" for key in short_form.words if key in command.given]
    if both:
        raise ConfigError(
            f"{shown} and {', '.join(both)}: give {expected} as words, or all of them as options"
        )
    if len(words) != len(short_form.words):
        raise ConfigError(f"expected {expected}, got {shown}")
    return {key: (word, _COMMAND_LINE) for key, word in zip(short_form.words, words, strict=True)}


def names_a_pipe(argv: Sequence[str]) -> bool:
    """Whether a --config-file is a pipe or a device, whose content can be read only once."""
    files = _split(argv, (), []).files
    return any(os.path.exists(name) and not os.path.isfile(name) for name in files)


def _help(parser: SectionParser, declared: fastargs.Config, everything: bool) -> str:
    """Usage, description and options, grouped by section."""
    is_common = {
        f"{name}.{field.name}": bool(field.metadata.get("common"))
        for name, section in parser.sections.items()
        for field in fields(section)
    }
    shown = shortened(is_common, everything)
    rows = []
    for section, paths in declared.sections_to_entries.items():
        listed = [path for path in paths if ".".join(path) in shown]
        if len(shown) == len(is_common):
            rows.append(("", ".".join(section)))
        for path in listed:
            param = declared.entries[path]
            state = "required" if param.required else f"default {_yaml_value(param.default)}"
            facts = "; ".join([param.checker.help(), state, *param.checker.facts()])
            rows.append((f"--{'.'.join(path)}", f"{param.desc} [{facts}]".strip()))
    general = [
        (
            "-C, --config-file=FILE",
            "YAML or JSON file of options; may be repeated, later files win",
        ),
        ("--print-config", "print the resolved options as YAML and exit"),
        ("-h, --help", "print this text and exit"),
    ]
    # The sections' own come first where they are few, and last where they fill pages.
    parts = [*rows, *general] if len(shown) < len(is_common) else [*general, *rows]
    rows = [("", parser.description.strip()), ("", "options"), *parts]
    if len(shown) < len(is_common):
        rows += remainder(len(is_common))
    words = list(parser.short_form.words.values()) if parser.short_form else []
    usage = [parser.prog, *words, "[--config-file=FILE ...]", "[--section.option=value ...]"]
    return help_text(" ".join(usage), rows)


def neutral_options(sections: Mapping[str, type]) -> frozenset[str]:
    """`section.option` names declared with affects_result=False."""
    return frozenset(
        f"{name}.{field.name}"
        for name, section in sections.items()
        for field in fields(section)
        if not field.metadata.get("affects_result", True)
    )


def default_options(sections: Mapping[str, type]) -> dict[str, Any]:
    """`section.option` -> default, in the format of `flat`; without those that are required."""
    found = {}
    for name, section in sections.items():
        for field in fields(section):
            default = default_of(field)
            if default is not MISSING:
                found[f"{name}.{field.name}"] = _plain(default)
    return found


def flat(config: SimpleNamespace) -> dict[str, Any]:
    """`section.option` -> value in declaration order, the format of params.json: bools as 0 or 1,
    tuples as lists.
    """
    plain = {}
    for name, section in vars(config).items():
        for field in fields(section):
            plain[f"{name}.{field.name}"] = _plain(getattr(section, field.name))
    return plain


def _plain(value: Any) -> Any:
    """An option's value as params.json has it."""
    if isinstance(value, bool):
        return int(value)
    return list(value) if isinstance(value, tuple) else value


def to_yaml(config: SimpleNamespace, sources: Mapping[str, str] | None = None) -> str:
    """YAML that `read` reads back to an equal configuration; `sources` (option -> text) become
    comments.
    """
    lines = []
    for name, section in vars(config).items():
        lines.append(f"{name}:")
        for field in fields(section):
            source = (sources or {}).get(f"{name}.{field.name}")
            comment = ""
            if source:
                comment = f"  # {source if source.isprintable() else show(source)}"
            lines.append(f"  {field.name}: {_yaml_value(getattr(section, field.name))}{comment}")
    return "".join(f"{line}\n" for line in lines)


def _yaml_value(value: object) -> str:
    """`value` as one line of YAML."""
    if isinstance(value, tuple):
        return f"[{', '.join(_yaml_value(item) for item in value)}]"
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    options = {"default_style": style, "width": math.inf, "allow_unicode": True}
    # As a list of one item, whose brackets are cut: a bare scalar would end with a line `...`.
    return yaml.safe_dump([value], default_flow_style=True, **options).strip()[1:-1]
