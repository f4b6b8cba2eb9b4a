"""Options of a program: dataclasses in, one validated namespace out.

    @dataclass(frozen=True)
    class LR:
        lr_peak_epoch: int = field(default=2, metadata={"help": "epoch of the highest rate"})

    config = read({"lr": LR, "training": Training}, argv)    # config.lr.lr_peak_epoch

A field without a default is required. `metadata` may hold `help`, `choices` (the legal values) and
`check` (value -> None, raises ValueError(reason)). Annotations: int, float (finite), str, bool,
`tuple[int, ...]`, `tuple[float, float]` and the like, and each of them `| None`; none, null and
empty text then mean None.

The syntax is that of fastargs (`--config-file x.yaml`, `--section.option=value`); it holds the
declarations. The reading is ours, because fastargs ignores unknown options, turns `False` into
true, lets the environment win and exits with status 0 on errors. Here later wins over earlier, and
the command line over files.
"""

import contextlib
import functools
import json
import math
import os
import reprlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import fastargs
import yaml
from fastargs.validation import Checker

P = ParamSpec("P")
R = TypeVar("R")
Given = dict[str, tuple[object, str]]  # option -> what was written, where

MAX_FILE_BYTES, MAX_FILE_VALUES = 1 << 20, 10_000

_COMMAND_LINE = "on the command line"
_TRUE, _FALSE, _NONE = ("true", "1", "yes", "on"), ("false", "0", "no", "off"), ("none", "null", "")
_PACKAGE = Path(__file__).resolve().parent
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
_show = _short.repr  # a message is one line, whatever a file holds


class ConfigError(ValueError):
    """The options are not usable; the message has one line for each thing to correct."""

    user_error = True


def _scalar(kind: type, value: Any) -> object:
    """`value`, text or already typed, as an int, float, str or bool; ValueError where it is none."""
    if kind is bool and (word := str(value).lower()) in _TRUE + _FALSE:
        return word in _TRUE
    if kind is str and isinstance(value, str):
        return value
    if kind is int and type(value) in (int, str):  # a bool is an int to Python only
        return int(value)
    if kind is float and type(value) in (int, float, str) and math.isfinite(number := float(value)):
        return number
    raise ValueError


class _Option(Checker):
    """fastargs checker of one field: annotation, then choices, then the field's own check."""

    def __init__(self, annotation: Any, meta: Mapping[str, Any]):
        kinds = [kind for kind in get_args(annotation | None) if kind is not NoneType]
        self.optional = NoneType in get_args(annotation)
        self.is_tuple = get_origin(kinds[0]) is tuple
        items = get_args(kinds[0]) if self.is_tuple else tuple(kinds)
        self.any_length = items[-1] is Ellipsis
        self.items: tuple[type, ...] = items[:1] if self.any_length else items
        if len(kinds) > 1 or not {int, float, str, bool}.issuperset(self.items):
            raise TypeError(f"unsupported annotation {annotation} ({meta.get('help')})")
        self.choices: tuple[object, ...] = tuple(meta.get("choices", ()))
        self.rule: Callable[[Any], None] | None = meta.get("check")

    def help(self) -> str:
        text = ",".join(item.__name__ for item in self.items) + ",..." * self.any_length
        return text + " or none" * self.optional

    def check(self, value: object) -> object:
        """The typed value; raises ValueError whose text is the reason."""
        if self.optional and str(value).strip().lower() in _NONE:
            return None
        try:
            typed = self._tuple(value) if self.is_tuple else _scalar(self.items[0], value)
        except (ValueError, OverflowError):
            raise ValueError(f"expected {self.help()}") from None
        if self.choices and typed not in self.choices:
            names = [str(choice) for choice in self.choices]
            raise ValueError(
                f"expected one of {', '.join(names)}{_did_you_mean(str(typed), names)}"
            )
        if self.rule is not None:
            self.rule(typed)
        return typed

    def _tuple(self, value: object) -> tuple[object, ...]:
        if isinstance(value, str):
            text = value.strip().removeprefix("[").removesuffix("]").strip()
            value = [part.strip() for part in text.split(",")] if text else []
        if not isinstance(value, list | tuple) or isinstance(value, _Pairs):
            raise ValueError
        kinds = self.items * len(value) if self.any_length else self.items
        return tuple(_scalar(kind, item) for kind, item in zip(kinds, value, strict=True))


def _declare(sections: Mapping[str, type]) -> fastargs.Config:
    """The sections in a fastargs.Config of their own: programs in one process do not see each
    other's.
    """
    declared = fastargs.Config()
    for name, section in sections.items():
        hints, params = get_type_hints(section), {}
        for field in fields(section):
            option, help_text = (
                _Option(hints[field.name], field.metadata),
                field.metadata.get("help", ""),
            )
            default = field.default if field.default_factory is MISSING else field.default_factory()
            required = default is MISSING
            params[field.name] = fastargs.Param(
                option, help_text, None if required else default, required
            )
        fastargs.Section(name, config_descriptor=declared).params(**params)
    return declared


class _Pairs(list[tuple[str, object]]):
    """A mapping as written: in order, duplicates included."""


class _Yaml(yaml.SafeLoader):
    """Refuses what makes a small file large: aliases, and very many values."""

    count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.count += 1
        if self.check_event(yaml.AliasEvent) or self.count > MAX_FILE_VALUES:
            what = f"aliases, and more than {MAX_FILE_VALUES} values, are not supported"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)


def _plain(node: yaml.Node | None) -> object:
    # scalars stay text: a value means the same in a file and as an argument (YAML 1.1 reads 010 as
    # 8)
    if isinstance(node, yaml.MappingNode):
        return _Pairs((str(_plain(key)), _plain(value)) for key, value in node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    return None if node is None or node.tag == "tag:yaml.org,2002:null" else node.value


def _walk(tree: _Pairs, names: Collection[str], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every section and option, in order; an option's value is not entered."""
    for key, value in tree:
        yield prefix + key, value
        if isinstance(value, _Pairs) and prefix + key not in names:
            yield from _walk(value, names, f"{prefix}{key}.")


def _open(name: str) -> tuple[str, bytes]:
    """Path and content of a config file, which may stand in three places."""
    root = [_PACKAGE.parent] if (_PACKAGE.parent / "pyproject.toml").is_file() else []
    tried = [folder / name for folder in (Path(), *root, _PACKAGE / "configs")]
    for place in tried:
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            open(place, "rb") as handle,
        ):
            return str(place), handle.read(MAX_FILE_BYTES + 1)
    places = ", ".join(dict.fromkeys(map(os.path.abspath, tried)))
    raise ConfigError(f"config file {_show(name)} was not found (tried {places})")


def _parse(path: str, content: bytes, names: Collection[str]) -> list[tuple[str, object]]:
    """What a file says, as (dotted key, value); a value is text, None, a list, _Pairs or (in JSON)
    a bool.
    """
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    line, text = 1, ""
    try:
        text = content.decode("utf-8-sig")
        if path.lower().endswith(".json"):
            as_text: dict[str, Any] = {"parse_int": str, "parse_float": str, "parse_constant": str}
            tree = json.loads(text, object_pairs_hook=_Pairs, **as_text)
        else:
            tree = _plain(yaml.compose(text, _Yaml))
        found = list(_walk(tree, names)) if isinstance(tree, _Pairs) else []
        if (tree is None or isinstance(tree, _Pairs)) and len(found) <= MAX_FILE_VALUES:
            return found
        what = (
            f"more than {MAX_FILE_VALUES} values"
            if found
            else f"expected options, not {_show(tree)}"
        )
    except yaml.MarkedYAMLError as error:
        line, what = error.problem_mark.line + 1 if error.problem_mark else 1, error.problem
    except yaml.reader.ReaderError as error:
        line, what = text.count("\n", 0, error.position) + 1, error.reason
    except json.JSONDecodeError as error:
        line, what = error.lineno, error.msg
    except UnicodeDecodeError as error:
        line, what = content.count(b"\n", 0, error.start) + 1, "not UTF-8 text"
    except RecursionError:
        what = "nested too deeply"
    raise ConfigError(f"{path}, line {line}: {what}")


def _read_file(name: str, params: Mapping[str, fastargs.Param], errors: list[str]) -> Given:
    """Options that a file gives; what is wrong with it goes to `errors`."""
    try:
        path, content = _open(name)
        found = _parse(path, content, params)
    except (ConfigError, OSError) as error:
        errors.append(str(error))
        return {}
    given, seen, source = Given(), set(), f"in file {path}"
    sections = {key.partition(".")[0] for key in params}
    for key, value in found:
        if key in seen:
            errors.append(f"duplicate key {_show(key)} {source}")
        elif key in params:
            given[key] = value, source
        elif key not in sections and not (value and isinstance(value, _Pairs)):
            errors.append(f"unknown option {_show(key)} {source}{_did_you_mean(key, params)}")
        elif key in sections and not (value is None or isinstance(value, _Pairs)):
            errors.append(f"{key}={_show(value)} {source}: expected a section of options")
        seen.add(key)
    return given


def _split(
    argv: Sequence[str], names: Collection[str], errors: list[str]
) -> tuple[list[str], Given, set[str]]:
    """Config files, options and switches (help, print-config); what is wrong goes to `errors`."""
    files, given, switches, known = [], {}, set(), [*names, "config-file"]
    waiting = [{"-h": "--help", "-C": "--config-file"}.get(word, word) for word in reversed(argv)]
    while waiting:
        word = waiting.pop()
        key, equals, value = word.removeprefix("--").partition("=")
        if word in ("--help", "--print-config"):
            switches.add(key)
            continue
        if word.startswith("--") and not equals and waiting and not waiting[-1].startswith("--"):
            equals, value = "=", waiting.pop()
        if not word.startswith("--"):
            errors.append(f"unexpected argument {_show(word)} {_COMMAND_LINE}")
        elif key not in known:
            errors.append(f"unknown option {_show(key)} {_COMMAND_LINE}{_did_you_mean(key, known)}")
        elif not equals or (key == "config-file" and not value):
            errors.append(f"{key} {_COMMAND_LINE}: a value is missing")
        elif key == "config-file":
            files.append(value)
        else:
            given[key] = value, _COMMAND_LINE
    return files, given, switches


def _did_you_mean(word: str, names: Collection[str]) -> str:
    option = "." + word.rpartition(".")[2]
    close = get_close_matches(word[:100], names, 1, 0.8) or [n for n in names if n.endswith(option)]
    return f" (did you mean {close[0]!r}?)" if close else ""


def _help(declared: fastargs.Config, prog: str, description: str) -> str:
    """Every option, grouped by section, fitted to the terminal."""
    width = max(40, min(shutil.get_terminal_size().columns, 120)) - 1
    switches = [
        (
            "-C, --config-file=FILE",
            "YAML or JSON file of options; may be repeated, later files win",
        ),
        ("--print-config", "print the resolved options as YAML and exit"),
        ("-h, --help", "print this text and exit"),
    ]
    rows = [("", description), *switches]
    for ns, paths in declared.sections_to_entries.items():
        rows.append(("", ".".join(ns)))
        for path in paths:
            param = declared.entries[path]
            choices = ", ".join(str(choice) for choice in param.checker.choices)
            state = "required" if param.required else f"default {_yaml_value(param.default)}"
            facts = f"{param.checker.help()}; {state}" + f"; one of {choices}" * bool(choices)
            rows.append((f"--{'.'.join(path)}", f"{param.desc} [{facts}]".strip()))
    column = min(4 + max(len(option) for option, _ in rows), width // 2)
    lines = textwrap.wrap(
        f"usage: {prog} [--config-file=FILE ...] [--section.option=value ...]", width
    )
    for option, text in rows:
        head, indent = (f"  {option}  ".ljust(column), " " * column) if option else ("", "")
        lines += [""] * (not option)
        lines += textwrap.wrap(text, width, initial_indent=head, subsequent_indent=indent)
    return "\n".join(lines)


def read(
    sections: Mapping[str, type],
    argv: Sequence[str] | None = None,
    *,
    prog: str = "",
    description: str = "",
) -> SimpleNamespace:
    """One instance of each section's dataclass, from config files and `argv` (default: the command
    line).

    A relative config file is looked up in the current folder, then in the repository's root, then
    among the configs installed with the package. `--help` and `--print-config` print and raise
    SystemExit(0). Raises ConfigError with everything that is wrong: unknown or missing options,
    values that do not fit, unreadable files. A ValueError of a section's `__post_init__` is
    reported the same way.
    """
    declared = _declare(sections)
    params = {".".join(path): param for path, param in declared.entries.items()}
    errors: list[str] = []
    files, typed, switches = _split(sys.argv[1:] if argv is None else argv, params, errors)
    if "help" in switches:
        print(_help(declared, prog or Path(sys.argv[0]).name, description), flush=True)
        raise SystemExit(0)

    given = Given()
    for name in files:
        given |= _read_file(name, params, errors)
    given |= typed
    config = SimpleNamespace()
    for name, section in sections.items():
        values, before = {}, len(errors)
        for field in fields(section):
            key = f"{name}.{field.name}"
            param = params[key]
            value, source = given.get(key, (param.default, "by default"))
            if param.required and key not in given:
                errors.append(f"{key} is required" + f": {param.desc}" * bool(param.desc))
                continue
            try:
                values[field.name] = param.checker.check(value)
            except ValueError as error:
                errors.append(f"{key}={_show(value)} {source}: {error}")
        if len(errors) == before:
            try:
                setattr(config, name, section(**values))
            except ValueError as error:
                errors.append(f"{name}: {error}")
    if errors:
        raise ConfigError("\n".join(errors))
    if "print-config" in switches:
        print(
            to_yaml(config, {key: source for key, (_, source) in given.items()}), end="", flush=True
        )
        raise SystemExit(0)
    return config


def flat(config: SimpleNamespace) -> dict[str, Any]:
    """`section.option` -> value in declaration order; bools as 0 or 1 and tuples as lists
    (params.json).
    """
    plain = {}
    for name, section in vars(config).items():
        for field in fields(section):
            value = getattr(section, field.name)
            value = int(value) if isinstance(value, bool) else value
            plain[f"{name}.{field.name}"] = list(value) if isinstance(value, tuple) else value
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
            comment = f"  # {source if source.isprintable() else _show(source)}" if source else ""
            lines.append(f"  {field.name}: {_yaml_value(getattr(section, field.name))}{comment}")
    return "".join(f"{line}\n" for line in lines)


def _yaml_value(value: object) -> str:
    """`value` as one line of YAML."""
    if isinstance(value, tuple):
        return f"[{', '.join(_yaml_value(item) for item in value)}]"
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    options = {"default_style": style, "width": math.inf, "allow_unicode": True}
    return yaml.safe_dump([value], default_flow_style=True, **options).strip()[1:-1]


def program(main: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a program's `main(argv=None)`: what a user can correct becomes `error: ...` and
    status 2.

    That is an exception whose class says `user_error = True`, or an OSError that names a file; both
    propagate when MATRYOSHKA_TRACEBACK=1 is in the environment. An interrupt is status 130; a
    reader of our output that went away is status 141, in silence. Any other exception is a bug of
    ours and propagates.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()  # a closed pipe shows here, not at the interpreter's exit
            return result
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:
            with contextlib.suppress(
                OSError, ValueError
            ):  # the rest of the buffer would raise again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except Exception as raised:
            error: Any = raised
            named = isinstance(error, OSError) and error.filename is not None
            for_user = named or getattr(error, "user_error", False)
            if not for_user or os.environ.get("MATRYOSHKA_TRACEBACK") == "1":
                raise
            message = (
                f"{error.filename}: {error.strerror}"
                if named
                else str(error) or type(error).__name__
            )
            print(*(f"error: {line}" for line in message.splitlines()), sep="\n", file=sys.stderr)
            raise SystemExit(2) from None

    return run
