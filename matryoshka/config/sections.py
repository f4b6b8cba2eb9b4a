"""Options in sections: `--config-file x.yaml`, `--section.option=value`.

The syntax is that of fastargs, which holds the declarations. The reading is ours, because fastargs
1.2.0 ignores unknown options, turns `False` into true, lets the environment win and exits with
status 0 on errors. Here later wins over earlier, and the command line over files.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import fastargs
import yaml

from matryoshka.config.files import Given, read_file
from matryoshka.config.layout import help_text
from matryoshka.config.options import (
    ConfigError,
    OutOfRange,
    default_of,
    did_you_mean,
    options_of,
    show,
)

_COMMAND_LINE = "on the command line"


class SectionParser(NamedTuple):
    """The options of one program in sections; `parse_args(argv)` calls `read` with them."""

    sections: Mapping[str, type]
    prog: str
    description: str

    def parse_args(self, argv: Sequence[str] | None = None) -> SimpleNamespace:
        """One instance of each section; see `read`."""
        return read(self.sections, argv, prog=self.prog, description=self.description)


def section_parser(prog: str, description: str, sections: Mapping[str, type]) -> SectionParser:
    """A parser of sections, the counterpart of `flat_parser`."""
    return SectionParser(sections, prog, description)


def read(
    sections: Mapping[str, type],
    argv: Sequence[str] | None = None,
    *,
    prog: str = "",
    description: str = "",
) -> SimpleNamespace:
    """One instance of each section's dataclass, from config files and `argv`.

    argv: default sys.argv[1:]. A relative config file is looked up in the current folder, then in
    the repository's root, then among the configs installed with the package. `--help` and
    `--print-config` print and raise SystemExit(0). ConfigError lists all errors: unknown and
    missing options, values of the wrong type or out of range, unreadable files. A ValueError from a
    section's `__post_init__` is reported the same way.
    """
    declared = _declare(sections)
    params = {".".join(path): param for path, param in declared.entries.items()}
    # All errors are collected: a user corrects them in one go.
    errors: list[str] = []
    files, typed, switches = _split(sys.argv[1:] if argv is None else argv, params, errors)
    if "help" in switches:
        print(_help(declared, prog or Path(sys.argv[0]).name, description), flush=True)
        raise SystemExit(0)

    # Later files win over earlier ones, and the command line over all of them.
    given = Given()
    for name in files:
        given |= read_file(name, params, errors)
    given |= typed
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
            number = str(error.value).removesuffix(".0")
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


def _split(
    argv: Sequence[str], names: Collection[str], errors: list[str]
) -> tuple[list[str], Given, set[str]]:
    """Config files, options and switches (help, print-config); errors are appended to `errors`."""
    files = []
    given = Given()
    switches = set()
    known = [*names, "config-file"]
    short = {"-h": "--help", "-C": "--config-file"}
    waiting = [short.get(word, word) for word in reversed(argv)]  # a stack: pop is the next word
    while waiting:
        word = waiting.pop()
        key, equals, value = word.removeprefix("--").partition("=")
        if word in ("--help", "--print-config"):
            switches.add(key)
            continue
        # `--option value`: the next word is the value unless it is an option itself.
        if word.startswith("--") and not equals and waiting and not waiting[-1].startswith("--"):
            equals, value = "=", waiting.pop()
        if not word.startswith("--"):
            errors.append(f"unexpected argument {show(word)} {_COMMAND_LINE}")
        elif key not in known:
            errors.append(f"unknown option {show(key)} {_COMMAND_LINE}{did_you_mean(key, known)}")
        elif not equals or (key == "config-file" and not value):
            errors.append(f"{key} {_COMMAND_LINE}: a value is missing")
        elif key == "config-file":
            files.append(value)
        else:
            given[key] = value, _COMMAND_LINE
    return files, given, switches


def names_a_pipe(argv: Sequence[str]) -> bool:
    """Whether a --config-file is a pipe or a device, whose content can be read only once."""
    files, _, _ = _split(argv, (), [])
    return any(os.path.exists(name) and not os.path.isfile(name) for name in files)


def _help(declared: fastargs.Config, prog: str, description: str) -> str:
    """Every option, grouped by section."""
    rows = [
        ("", description),
        ("", "options"),
        (
            "-C, --config-file=FILE",
            "YAML or JSON file of options; may be repeated, later files win",
        ),
        ("--print-config", "print the resolved options as YAML and exit"),
        ("-h, --help", "print this text and exit"),
    ]
    for section, paths in declared.sections_to_entries.items():
        rows.append(("", ".".join(section)))
        for path in paths:
            param = declared.entries[path]
            state = "required" if param.required else f"default {_yaml_value(param.default)}"
            facts = "; ".join([param.checker.help(), state, *param.checker.facts()])
            rows.append((f"--{'.'.join(path)}", f"{param.desc} [{facts}]".strip()))
    return help_text(f"{prog} [--config-file=FILE ...] [--section.option=value ...]", rows)


def neutral_options(sections: Mapping[str, type]) -> frozenset[str]:
    """`section.option` names declared with affects_result=False."""
    return frozenset(
        f"{name}.{field.name}"
        for name, section in sections.items()
        for field in fields(section)
        if not field.metadata.get("affects_result", True)
    )


def flat(config: SimpleNamespace) -> dict[str, Any]:
    """`section.option` -> value in declaration order, the format of params.json: bools as 0 or 1,
    tuples as lists.
    """
    plain = {}
    for name, section in vars(config).items():
        for field in fields(section):
            value = getattr(section, field.name)
            if isinstance(value, bool):
                value = int(value)
            elif isinstance(value, tuple):
                value = list(value)
            plain[f"{name}.{field.name}"] = value
    return plain


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
