"""Hostile values of every option of every program, derived from the declarations."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import hostile_options
import pytest
import small_commands
import torch
from attacks.scale import scaled
from hostile_options import Declared
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.checkpoint import transfer
from matryoshka.config import ConfigError, files
from matryoshka.environment import VariableError, count_in
from matryoshka.models import ModelConfig, build, model_spec
from matryoshka.models.options import ModelError

MAX_LINE = 5000  # characters of an error: a path may have 4096
DECLARED = hostile_options.declared()
PROGRAMS = sorted({option.program for option in DECLARED})
# Legal values that only tell where outputs go, or that start more than a process.
NO_RUN = ("dist.world_size", "logging.wandb", "tensorboard")


def options_of(program: str) -> list[Declared]:
    return [option for option in DECLARED if option.program == program]


def lines_of(error: Exception) -> list[str]:
    """The lines that a user sees of an error; fails for one that is not legible."""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    lines = text.splitlines()
    assert lines, "an error without a word"
    for line in lines:
        assert len(line) <= MAX_LINE, line[:200]
    return lines


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_value_is_refused_in_a_line_or_lies_in_its_range(program):
    parsers = hostile_options.all_parsers()
    base = hostile_options.required(parsers[program])
    rng = random.Random(program)
    for option in options_of(program):
        texts = option.texts()
        for text in rng.sample(texts, min(len(texts), scaled(2, 10_000))):
            argv = option.after(base, text)
            try:
                args = parsers[program].parse_args(argv)
            except (ConfigError, OSError) as error:
                lines_of(error)
                continue
            value = args
            for part in option.name.split("."):
                value = getattr(value, part, None)
            assert hostile_options.is_legal(option.option, value), f"{option}={text!r}: {value}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_numbers_next_to_a_range_are_refused(program):
    """Each by a line that names the option and its range."""
    parsers = hostile_options.all_parsers()
    base = hostile_options.required(parsers[program])
    for option in options_of(program):
        for number in option.outside() if option.is_number else ():
            count = len(option.option.items)
            text = ",".join([repr(number)] * count)
            with pytest.raises(ConfigError) as caught:
                parsers[program].parse_args(option.after(base, text))
            (line, *_) = lines_of(caught.value)
            assert option.field.name.replace("_", "-") in line.replace("_", "-")
            assert str(option.option.range) in line


# ---------------------------------------------------------------- files of options

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
NAMES = ["lr.lr", "model.dims", "logging.run_id", "training.seed", "data.ratio", "ssl.method"]


@settings(max_examples=scaled(30, 20_000))
@given(st.dictionaries(st.sampled_from(NAMES), TREES), st.sampled_from(["yaml", "json"]))
def test_values_of_any_type_in_a_file(tmp_path_factory, values, ending):
    path = tmp_path_factory.getbasetemp() / f"options.{ending}"
    path.write_text(json.dumps(values))
    for program in ("train", "ssl", "cifar"):
        parser = hostile_options.all_parsers()[program]
        try:
            args = parser.parse_args([f"--config-file={path}"])
        except ConfigError as error:
            lines_of(error)
            continue
        assert args.lr.lr is None or math.isfinite(args.lr.lr)
        assert 0 <= args.training.seed < 2**63


PIECES = ["a: ", "- ", "[", "]", "{", "}", "&x ", "*x", "!!int ", "!!binary ", "? ", "|\n", ">\n"]
PIECES += ["'", '"', "\\0", "\\U99999999", "\\ud800", "%YAML 1.1\n", "---\n", "...\n", "#", "\t"]
PIECES += [
    "!!bool ",
    "!!float ",
    "!!timestamp ",
    "!!set ",
    "!!omap ",
    "!!pairs ",
    "!!str ",
    "!!null ",
]
PIECES += ["\n", " ", "<<: ", "lr", ".lr", "1e308", "2026-13-45", "0x", "\0", "\x85", "\u2028", "~"]


@settings(max_examples=scaled(100, 50_000))
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=3).map(repr), max_size=30))
def test_pieces_of_yaml(tmp_path_factory, pieces):
    content = "".join(pieces).encode("utf-8", "surrogatepass")
    path = tmp_path_factory.getbasetemp() / "pieces.yaml"
    path.write_bytes(content)
    errors: list[str] = []
    files.read_file(str(path), ["lr.lr", "model.dims"], errors)
    for error in errors:
        lines_of(ConfigError(error))
    try:
        files.load_yaml(content)
    except ConfigError as error:
        lines_of(error)


BOMBS = {
    "aliases": "a: &a [1, 1]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(50)),
    "depth": "[" * 20_000,
    "keys": "".join(f"k{i}: 1\n" for i in range(90_000)),
    "one key": "lr: {lr: 1, lr: 2}\n",
    "NUL": 'lr: {lr: "\\0"}\nlogging: {run_id: "a\\0b"}\n',
    "a lone surrogate": 'logging: {run_id: "\\ud800"}\n',
    "beyond Unicode": 'lr: {lr: "\\U99999999"}\n',
    "a version": "%YAML 1." + "9" * 5000 + "\n---\na: 1\n",
    "an object": "lr: !!python/object/apply:os.system [true]\n",
    "size": "#" * 2_000_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bomb.yaml").write_text(BOMBS[name])
    for argv in (["train", "--config-file=bomb.yaml"], ["sweep", "bomb.yaml"]):
        assert small_commands.status(argv) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines
        assert all(line.startswith("error: ") for line in lines)


# ---------------------------------------------------------------- runs


def accepted(program: str) -> list[tuple[Declared, str]]:
    """(option, legal extreme) of the program's options."""
    found = []
    for option in options_of(program):
        if option.name in NO_RUN or option.field.metadata.get("positional"):
            continue
        for text in option.legal_ends() if option.is_number else ():
            found.append((option, text))
    return found


@pytest.mark.parametrize("program", small_commands.names())
def test_legal_extremes_end(program, inputs, tmp_path, monkeypatch, capsys):
    """In a finite result, or in one line and status 2: one run of each program, all in `attack`.

    A program that computes on a device has chosen its kernels: float32 without TF32.
    """
    cases = accepted(program)
    on_device = any(x.name.rpartition(".")[2] == "device" for x in options_of(program))
    random.Random(program).shuffle(cases)
    for number, (option, text) in enumerate(cases[: scaled(1, 10_000)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        argv = small_commands.command(program, inputs, folder / "out")
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        code = small_commands.status([*argv, *option.words(text)])
        shown = capsys.readouterr()
        assert code in (0, 2), f"{option}={text}: {shown.err[-500:]}"
        assert "Traceback" not in shown.err, f"{option}={text}: {shown.err[-500:]}"
        if code == 2:
            lines = [x for x in shown.err.splitlines() if x.startswith("error: ")]
            assert lines, f"{option}={text}: {shown.err[-500:]}"
        if code == 0:
            check_finite(folder, f"{option}={text}")
            assert torch.backends.cudnn.allow_tf32 != on_device, "does not choose its kernels"


def check_finite(folder: Path, case: str) -> None:
    """Numbers of logs are finite."""
    for path in folder.rglob("log"):
        for line in path.read_text().splitlines():
            for key, value in json.loads(line).items():
                assert not isinstance(value, float) or math.isfinite(value), f"{case}: {key}"


OUTSIDE = ["../..", "..", ".", "/etc", "a/b", ".hidden", "a\0b", "a\nb", "\ud800", "x" * 300]


@pytest.mark.parametrize("program", ["train", "cifar", "ssl", "probe"])
def test_a_run_id_stays_in_its_folder(program, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = small_commands.command(program, inputs, tmp_path / "deep" / "er")
    for name in OUTSIDE:
        assert small_commands.status([*base, f"--logging.run_id={name}"]) == 2
        assert "logging.run_id" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the environment, the machine


@pytest.mark.parametrize(
    "text", ["", " ", "x", "-1", "1e3", "0x1", "1.5", "9" * 10, "\u0661", "1\n"]
)
def test_a_variable_of_torchrun_that_is_no_number(text, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(VariableError, match=r"environment variable WORLD_SIZE: .*whole number"):
        count_in("WORLD_SIZE")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert count_in("WORLD_SIZE") == 16
    monkeypatch.delenv("WORLD_SIZE")
    assert count_in("WORLD_SIZE", 1) == 1
    with pytest.raises(VariableError, match="WORLD_SIZE: unset"):
        count_in("WORLD_SIZE")


def test_a_model_that_does_not_fit_into_memory(monkeypatch):
    """Otherwise the system ends the process, without a word."""
    config = ModelConfig(arch="resnet10", mrl=True)
    spec = model_spec(config, 10)
    transfer.check_start(config, spec)
    weights = 4 * sum(p.numel() for p in build(spec).parameters())
    monkeypatch.setattr(transfer, "free_memory", lambda: weights)
    transfer.check_start(config, spec)
    monkeypatch.setattr(transfer, "free_memory", lambda: weights - 1)
    with pytest.raises(ModelError, match=r"model\.arch=resnet10: .* parameters need 0\.0 GB"):
        transfer.check_start(config, spec)
