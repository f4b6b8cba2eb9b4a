"""Sweep files of Weights & Biases: their YAML, the distributions of the parameters, the command.

A parameter is drawn from a simple domain (a range of numbers, or choices), and its value follows
from what was drawn: rounded to a multiple of q, or through the inverse of a distribution function.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from matryoshka.config.files import load_yaml
from matryoshka.config.limits import MAX_COUNT
from matryoshka.config.options import ConfigError, did_you_mean, show
from matryoshka.files import read_regular

MAX_BYTES = 1 << 20
METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")
KEYS = ("program", "command", "method", "metric", "parameters", "early_terminate", "run_cap")
# Of W&B's server, or for people to read: they change nothing here.
LABELS = ("name", "description", "project", "entity", "apiVersion", "kind", "controller")
VARIABLE = re.compile(r"\$\{envvar:(\w+)\}")
STYLES = ("args", "args_no_hyphens", "args_no_equals", "args_no_boolean_flags", "args_json")
MACROS = ("env", "interpreter", "program", "envvar:NAME", *STYLES)
MAX_NUMBER = 1e15  # above, float64 has no neighbouring integers
MAX_EXPONENT = 700  # e^709 is the largest float64
MAX_GRID = 10_000  # points, each a row of the data base

Q = {"q": 1}
NORMAL = {"mu": 0, "sigma": 1}
BETA = {"a": 1, "b": 1}
RANGE = {"min": None, "max": None}
# {distribution: its keys with their defaults}; None: required
DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "constant": {"value": None},
    "categorical": {"values": None},
    "categorical_w_probabilities": {"values": None, "probabilities": None},
    "int_uniform": RANGE,
    "uniform": RANGE,
    "q_uniform": RANGE | Q,
    "log_uniform": RANGE,  # min and max are exponents of e
    "q_log_uniform": RANGE | Q,
    "inv_log_uniform": RANGE,
    "log_uniform_values": RANGE,
    "q_log_uniform_values": RANGE | Q,
    "inv_log_uniform_values": RANGE,
    "normal": NORMAL,
    "q_normal": NORMAL | Q,
    "log_normal": NORMAL,
    "q_log_normal": NORMAL | Q,
    "beta": BETA,
    "q_beta": BETA | Q,
}
EXPONENTS = (
    *("log_uniform", "q_log_uniform", "inv_log_uniform"),
    *("log_normal", "q_log_normal"),
)
# Share of a distribution's tails that is cut off: its inverse is infinite at 0 and 1.
TAIL = 1e-9


class SweepError(ValueError):
    """A sweep that cannot run; the message names the file or the option, and the remedy."""

    user_error = True


@dataclass(frozen=True)
class Domain:
    """What is drawn for a parameter: a number from low to high, or one of some texts.

    kind: float, int, choice, or constant (nothing is drawn). log: evenly in the logarithm.
    """

    kind: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """An option that a sweep varies. facts: the keys of its distribution, see DISTRIBUTIONS."""

    name: str
    distribution: str
    facts: Mapping[str, Any]

    def domain(self) -> Domain:
        """What is drawn for it; the texts of choices are JSON, so that 1 and true differ."""
        kind, facts = self.distribution, self.facts
        if kind == "constant":
            return Domain("constant")
        if kind == "categorical":
            return Domain("choice", choices=tuple(json.dumps(v) for v in facts["values"]))
        if kind == "int_uniform":
            return Domain("int", facts["min"], facts["max"])
        if kind in ("uniform", "q_uniform"):
            return Domain("float", facts["min"], facts["max"])
        if kind.endswith("log_uniform_values"):
            return Domain("float", facts["min"], facts["max"], log=True)
        if kind == "inv_log_uniform":
            return Domain("float", math.exp(-facts["max"]), math.exp(-facts["min"]), log=True)
        if kind.endswith("log_uniform"):
            return Domain("float", math.exp(facts["min"]), math.exp(facts["max"]), log=True)
        return Domain("float", TAIL, 1 - TAIL)  # a quantile

    def value(self, drawn: Any = None) -> Any:
        """The option's value for what was drawn from `domain`."""
        kind, facts = self.distribution, self.facts
        if kind == "constant":
            return facts["value"]
        if kind == "categorical":
            return json.loads(drawn)
        if kind == "categorical_w_probabilities":
            below = 0.0
            for value, share in zip(facts["values"], facts["probabilities"], strict=True):
                below += share
                if drawn < below:
                    return value
            return facts["values"][-1]
        if kind in ("normal", "q_normal", "log_normal", "q_log_normal"):
            drawn = facts["mu"] + facts["sigma"] * NormalDist().inv_cdf(drawn)
            if "log" in kind:
                drawn = math.exp(min(drawn, MAX_EXPONENT))
        if kind in ("beta", "q_beta"):
            from scipy.stats import beta  # half a second to import

            drawn = float(beta.ppf(drawn, facts["a"], facts["b"]))
        return rounded(drawn, facts["q"]) if "q" in facts else drawn

    def grid(self) -> list[Any]:
        """What a grid search draws, all of it. ValueError for a continuous distribution."""
        domain = self.domain()
        if domain.kind == "constant":
            return [None]
        if domain.kind == "choice":
            return list(domain.choices)
        if domain.kind == "int":
            self._check_grid(domain.high - domain.low)
            return list(range(int(domain.low), int(domain.high) + 1))
        if self.distribution == "q_uniform":
            q = self.facts["q"]
            self._check_grid((domain.high - domain.low) / q)
            first, last = round(domain.low / q), round(domain.high / q)
            values = [rounded(k * q, q) for k in range(first, last + 1)]
            # What is drawn must lie in the domain, also where rounding has left it.
            return [min(max(value, domain.low), domain.high) for value in values]
        raise ValueError(f"method: grid needs values, not the distribution {self.distribution}")

    def _check_grid(self, steps: float) -> None:
        if steps > MAX_GRID:
            raise ValueError(
                f"parameters.{self.name}: a grid of {steps:,.0f} points; at most {MAX_GRID:,}"
            )


def rounded(value: float, q: float) -> float:
    """The multiple of q next to `value`, an int if q is one."""
    multiple = round(value / q) * q
    # 9 * 1e-4 is 0.0009000000000000001
    return multiple if isinstance(q, int) else float(f"{multiple:.12g}")


@dataclass(frozen=True)
class Stopping:
    """Hyperband: a trial is first judged after `first` epochs, then after eta times as many.

    last: the epochs of a whole trial; None: those of the first that ends.
    """

    first: int
    eta: int = 3
    last: int | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep file. target: the value of the metric at which the sweep ends."""

    path: Path
    program: str
    command: tuple[str, ...]
    method: str
    metric: str
    maximise: bool
    target: float | None
    parameters: tuple[Parameter, ...]
    stopping: Stopping | None
    run_cap: int | None

    def varied(self) -> list[str]:
        """The names of the options that are not constant."""
        return [p.name for p in self.parameters if p.distribution != "constant"]

    def points(self) -> int | None:
        """Number of points of a grid; None for the other methods. SweepError for too many."""
        if self.method != "grid":
            return None
        count = math.prod(len(parameter.grid()) for parameter in self.parameters)
        if count > MAX_GRID:
            raise SweepError(f"{self.path}: a grid of {count:,} points; at most {MAX_GRID:,}")
        return count

    def search(self) -> dict[str, Any]:
        """All that decides what is searched; the same in every start of a study."""
        return {
            "program": self.program,
            "command": list(self.command),
            "method": self.method,
            "metric": self.metric,
            "maximise": self.maximise,
            "parameters": {p.name: [p.distribution, dict(p.facts)] for p in self.parameters},
        }


# ---------------------------------------------------------------- reading


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep file. Raises SweepError, one line, for the first mistake; OSError."""
    path = Path(path)
    try:
        content = load_yaml(read_regular(path, max_bytes=MAX_BYTES))
    except ConfigError as error:
        where, _, reason = str(error).partition(": ")
        raise SweepError(f"{path}, {where}: not valid YAML: {reason}") from None
    except OSError as error:
        if error.errno == errno.EFBIG:
            text = f"{path}: more than {MAX_BYTES} bytes: not a sweep file"
            raise SweepError(text) from None
        raise
    try:
        return _sweep(path, content)
    except ValueError as error:
        raise SweepError(f"{path}: {error}") from None


def _sweep(path: Path, content: Any) -> Sweep:
    content = _mapping(content, "the file", (*KEYS, *LABELS))
    for key in ("program", "method", "metric", "parameters"):
        if key not in content:
            raise ValueError(f"{key} is missing")
    method = _choice(content["method"], "method", METHODS)
    metric = _mapping(content["metric"], "metric", ("name", "goal", "target"))
    parameters = []
    given = _mapping(content["parameters"], "parameters")
    for name, facts in given.items():
        parameters.append(_parameter(str(name), facts))
    if all(p.distribution == "constant" for p in parameters):
        raise ValueError("parameters: none of them varies; give one values, or min and max")
    if method == "grid":
        for parameter in parameters:
            parameter.grid()  # raises
    command = content.get("command", ["${env}", "${interpreter}", "${program}", "${args}"])
    if not isinstance(command, list) or not command:
        raise ValueError("command: expected a list of words")
    run_cap = content.get("run_cap")
    target = metric.get("target")
    return Sweep(
        path=path,
        program=_text(content["program"], "program"),
        command=tuple(str(word) for word in command),
        method=method,
        metric=_text(metric.get("name"), "metric.name"),
        maximise=_choice(metric.get("goal", "minimize"), "metric.goal", GOALS) == "maximize",
        target=None if target is None else _number(target, "metric.target"),
        parameters=tuple(parameters),
        stopping=_stopping(content.get("early_terminate")),
        run_cap=None if run_cap is None else _count(run_cap, "run_cap"),
    )


def _parameter(name: str, given: Any) -> Parameter:
    where = f"parameters.{show(name)[1:-1]}"
    given = _mapping(given, where)
    if "parameters" in given:
        raise ValueError(f"{where}: nested parameters; write them as `{name}.inner` and so on")
    distribution = given.get("distribution") or _implied(given, where)
    if not isinstance(distribution, str) or distribution not in DISTRIBUTIONS:
        known = list(DISTRIBUTIONS)
        hint = did_you_mean(str(distribution), known)
        raise ValueError(
            f"{where}: unknown distribution {show(distribution)}{hint}; known: {', '.join(known)}"
        )
    keys = DISTRIBUTIONS[distribution]
    _mapping(given, where, ("distribution", *keys))
    facts = {}
    for key, default in keys.items():
        if key not in given and default is None:
            raise ValueError(f"{where}: {distribution} needs {key}")
        value = given.get(key, default)
        if key not in ("value", "values", "probabilities"):
            value = _number(value, f"{where}.{key}")
        facts[key] = value
    _check(distribution, facts, where)
    return Parameter(name, distribution, facts)


def _implied(given: Mapping[str, Any], where: str) -> str:
    """The distribution of a parameter that names none, as W&B infers it."""
    if "value" in given:
        return "constant"
    if "values" in given:
        return "categorical_w_probabilities" if "probabilities" in given else "categorical"
    if "min" in given and "max" in given:
        limits = [_number(given[key], f"{where}.{key}") for key in ("min", "max")]
        return "int_uniform" if all(isinstance(n, int) for n in limits) else "uniform"
    raise ValueError(f"{where}: expected value, values, min and max, or a distribution")


def _check(distribution: str, facts: dict[str, Any], where: str) -> None:
    """ValueError for numbers that a distribution cannot have."""
    for key in ("value", "values"):
        try:
            json.dumps(facts.get(key))
        except (TypeError, ValueError):  # YAML has dates, and bytes
            raise ValueError(f"{where}.{key}: expected numbers or text") from None
    if "values" in facts:
        values = facts["values"]
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}.values: expected a list of values")
        shares = facts.get("probabilities", [1.0])
        if not isinstance(shares, list) or not all(isinstance(s, int | float) for s in shares):
            raise ValueError(f"{where}.probabilities: expected a list of numbers")
        for share in shares:
            _number(share, f"{where}.probabilities")
        if "probabilities" in facts and len(shares) != len(values):
            raise ValueError(f"{where}.probabilities: expected one for each of the values")
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"{where}.probabilities: expected a sum of 1, none below 0")
    if "min" in facts and facts["min"] >= facts["max"]:
        raise ValueError(f"{where}: min={facts['min']} is not below max={facts['max']}")
    if distribution in EXPONENTS:
        for key, value in facts.items():
            if key != "q" and abs(value) > MAX_EXPONENT:
                text = f"expected an exponent of e, -{MAX_EXPONENT} to {MAX_EXPONENT}"
                raise ValueError(f"{where}.{key}={value}: {text}")
    if "log_uniform_values" in distribution and facts["min"] <= 0:
        raise ValueError(f"{where}.min={facts['min']}: expected more than 0 for a logarithm")
    if distribution == "int_uniform" and not all(isinstance(n, int) for n in facts.values()):
        raise ValueError(f"{where}: int_uniform needs whole numbers")
    for key in ("q", "sigma", "a", "b"):
        if key in facts and facts[key] <= 0:
            raise ValueError(f"{where}.{key}={facts[key]}: expected more than 0")


def _stopping(given: Any) -> Stopping | None:
    if given is None:
        return None
    name = "early_terminate"
    given = _mapping(given, name, ("type", "min_iter", "max_iter", "s", "eta"))
    _choice(given.get("type"), f"{name}.type", ("hyperband",))
    eta = _count(given.get("eta", 3), f"{name}.eta")
    if eta < 2:
        raise ValueError(f"{name}.eta={eta}: expected 2 or more")
    if ("min_iter" in given) == ("max_iter" in given):
        raise ValueError(f"{name}: expected min_iter, or max_iter and s")
    if "min_iter" in given:
        if "s" in given:
            raise ValueError(f"{name}.s: belongs to max_iter; leave it out")
        return Stopping(_count(given["min_iter"], f"{name}.min_iter"), eta)
    last = _count(given["max_iter"], f"{name}.max_iter")
    # W&B's bands are max_iter / eta, ..., max_iter / eta^s.
    brackets = min(_count(given.get("s"), f"{name}.s"), 64)  # from there on, eta^s > max_iter
    return Stopping(max(1, last // eta**brackets), eta, last)


def _mapping(given: Any, where: str, keys: Sequence[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected `key: value` lines")
    for key in given:
        if keys is not None and key not in keys:
            hint = did_you_mean(str(key), keys)
            raise ValueError(f"{where}: {show(key)} is not supported{hint}")
    return given


def _choice(given: Any, where: str, choices: Sequence[str]) -> str:
    if given not in choices:
        hint = did_you_mean(str(given), choices)
        raise ValueError(f"{where}={show(given)}: expected one of {', '.join(choices)}{hint}")
    return given


def _text(given: Any, where: str) -> str:
    if not isinstance(given, str) or not given.strip() or not given.isprintable():
        raise ValueError(f"{where}: expected a text")
    return given


def _number(given: Any, where: str) -> float:
    """An int or a finite float. YAML reads 1e-4, without a point, as a text."""
    if isinstance(given, str):
        try:
            given = float(given)
        except ValueError:
            given = None
    if isinstance(given, bool) or not isinstance(given, int | float) or math.isnan(given):
        raise ValueError(f"{where}: expected a number")
    if abs(given) > MAX_NUMBER:
        raise ValueError(f"{where}={show(given)}: expected at most {MAX_NUMBER:g}")
    return given


def _count(given: Any, where: str) -> int:
    if type(given) is not int or not 1 <= given <= MAX_COUNT:
        raise ValueError(f"{where}={show(given)}: expected a whole number, 1 to {MAX_COUNT}")
    return given


# ---------------------------------------------------------------- the command


def command_line(
    sweep: Sweep, program: Sequence[str], values: Mapping[str, Any], extra: Sequence[str]
) -> list[str]:
    """The words that start a trial: the sweep's command with its macros replaced, then `extra`.

    program: the words for ${program}. values: {option: value}, passed as `--option=value`.
    SweepError for an unknown macro.
    """
    words: list[str] = []
    for written in sweep.command:
        word = VARIABLE.sub(lambda match: _variable(sweep, match[1]), written)
        name = word[2:-1] if word.startswith("${") and word.endswith("}") else None
        if name is None:
            words.append(word)
        elif name == "env":
            words.append("/usr/bin/env")
        elif name == "interpreter":
            words.append(sys.executable)
        elif name == "program":
            words += program
        else:
            words += _arguments(sweep, name, values)
    return [*words, *extra]


def _variable(sweep: Sweep, name: str) -> str:
    if name not in os.environ:
        raise SweepError(f"{sweep.path}: command: the environment variable {name} is not set")
    return os.environ[name]


def _arguments(sweep: Sweep, macro: str, values: Mapping[str, Any]) -> list[str]:
    """The options in one of W&B's styles."""
    if macro not in STYLES:
        raise SweepError(
            f"{sweep.path}: command: unknown macro ${{{macro}}}; known: {', '.join(MACROS)}"
        )
    if macro == "args":
        return [f"--{name}={value}" for name, value in values.items()]
    if macro == "args_no_hyphens":
        return [f"{name}={value}" for name, value in values.items()]
    if macro == "args_json":
        return [json.dumps(dict(values))]
    words: list[str] = []
    for name, value in values.items():
        if macro == "args_no_equals":
            words += [f"--{name}", str(value)]
        elif value is True:  # args_no_boolean_flags
            words.append(f"--{name}")
        elif value is not False:
            words.append(f"--{name}={value}")
    return words
