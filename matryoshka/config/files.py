"""YAML and JSON files of options."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from matryoshka.config.options import ConfigError, did_you_mean, legible, show
from matryoshka.files import read_stream

Given = dict[str, tuple[object, str]]  # option -> (value as written, its source)

MAX_FILE_BYTES = 1 << 20
MAX_FILE_VALUES = 10_000
_PACKAGE = Path(__file__).resolve().parents[1]


class _Pairs(list[tuple[str, object]]):
    """A mapping as written: in order, duplicates included."""


class _Yaml(yaml.SafeLoader):
    """Loader that refuses aliases and very many values, which expand a small file without bound."""

    count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.count += 1
        # An alias of aliases expands exponentially ("billion laughs").
        if self.check_event(yaml.AliasEvent) or self.count > MAX_FILE_VALUES:
            problem = f"aliases, and more than {MAX_FILE_VALUES} values, are not supported"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)


class _Data(_Yaml):
    """_Yaml for `load_yaml`: a key that is given twice is an error, and so is a NUL character."""

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if "\0" in node.value:
            raise yaml.MarkedYAMLError(problem="a NUL character", problem_mark=node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.value.__hash__ and key.value in seen:
                problem = f"{show(key.value)} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value if key.value.__hash__ else None)
        return node


def load_yaml(content: bytes) -> object:
    """Numbers, text, lists and mappings of a YAML file. ConfigError: `line N: reason`.

    Aliases, keys that are given twice and more than MAX_FILE_VALUES values are errors.
    """
    with _located(content):
        return _Data(content.decode("utf-8-sig")).get_single_data()


@contextlib.contextmanager
def _located(content: bytes, place: str = "") -> Iterator[None]:
    """Run a reader of `content`; its error becomes a ConfigError: `<place>line N: reason`."""
    line = 1
    # Each library reports the position in its own way.
    try:
        yield
        return
    except yaml.MarkedYAMLError as error:
        problem = error.problem
        if error.problem_mark:
            line = error.problem_mark.line + 1
    except yaml.reader.ReaderError as error:
        problem = error.reason
        line = content.decode("utf-8-sig").count("\n", 0, error.position) + 1
    except json.JSONDecodeError as error:
        problem = error.msg
        line = error.lineno
    except UnicodeDecodeError as error:
        problem = "not UTF-8 text"
        line = content.count(b"\n", 0, error.start) + 1
    except RecursionError:
        problem = "nested too deeply"
    # The 13th month, a number of 5,000 digits; PyYAML checks nothing of an explicit type: `!!int`
    # without a number, `!!bool x`, `!!timestamp x`.
    except (ValueError, OverflowError, LookupError, AttributeError, TypeError):
        problem = "a number, date or character that does not exist"
    raise ConfigError(f"{place}line {line}: {problem}")


def read_file(name: str, options: Collection[str], errors: list[str]) -> Given:
    """The options of a file; errors are appended to `errors`."""
    try:
        path, content = _open(name)
        pairs = _parse(path, content, options)
    except (ConfigError, OSError) as error:
        errors.append(str(error))
        return {}

    given = Given()
    seen = set()
    source = f"in file {path}"
    sections = {key.partition(".")[0] for key in options}
    for key, value in pairs:
        is_section = isinstance(value, _Pairs)
        if key in seen:
            errors.append(f"duplicate key {show(key)} {source}")
        elif key in options:
            given[key] = value, source
        elif key not in sections and not (value and is_section):
            errors.append(f"unknown option {show(key)} {source}{did_you_mean(key, options)}")
        elif key in sections and not (value is None or is_section):
            errors.append(f"{key}={show(value)} {source}: expected a section of options")
        seen.add(key)
    return given


def _open(name: str) -> tuple[str, bytes]:
    """Path and content of a config file, looked up in three places."""
    # An installed package has no repository around it, but the configs beside its modules.
    root = [_PACKAGE.parent] if (_PACKAGE.parent / "pyproject.toml").is_file() else []
    candidates = [folder / name for folder in (Path(), *root, _PACKAGE / "configs")]
    for path in candidates:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return str(path), read_stream(path, max_bytes=MAX_FILE_BYTES)
    tried = ", ".join(dict.fromkeys(map(os.path.abspath, candidates)))
    raise ConfigError(f"config file {show(name)} was not found (tried {legible(tried)})")


def _parse(path: str, content: bytes, options: Collection[str]) -> list[tuple[str, object]]:
    """(dotted key, value) pairs of a file; a value is text, None, a list, _Pairs or, in JSON, a
    bool.
    """
    with _located(content, f"{path}, "):
        text = content.decode("utf-8-sig")
        if path.lower().endswith(".json"):
            # Numbers stay text here, too: the option's own type decides.
            as_text: dict[str, Any] = {"parse_int": str, "parse_float": str, "parse_constant": str}
            tree = json.loads(text, object_pairs_hook=_Pairs, **as_text)
        else:
            tree = _plain(yaml.compose(text, _Yaml))
        pairs = list(_walk(tree, options)) if isinstance(tree, _Pairs) else []
    if not (tree is None or isinstance(tree, _Pairs)):
        raise ConfigError(f"{path}, line 1: expected options, not {show(tree)}")
    if len(pairs) > MAX_FILE_VALUES:
        raise ConfigError(f"{path}, line 1: more than {MAX_FILE_VALUES} values")
    return pairs


def _plain(node: yaml.Node | None) -> object:
    """A YAML node as _Pairs, lists and text.

    Scalars stay text, so that a value means the same in a file and as an argument (YAML 1.1 reads
    010 as 8).
    """
    if isinstance(node, yaml.MappingNode):
        return _Pairs((str(_plain(key)), _plain(value)) for key, value in node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    return None if node is None or node.tag == "tag:yaml.org,2002:null" else node.value


def _walk(tree: _Pairs, options: Collection[str], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every section and option, in order; descends into sections only."""
    for key, value in tree:
        yield prefix + key, value
        if isinstance(value, _Pairs) and prefix + key not in options:
            yield from _walk(value, options, f"{prefix}{key}.")
