"""Declarations of all programs: quick to read, complete, and equal to what they name elsewhere."""

import ast
import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import typing
from pathlib import Path

import pytest
from matryoshka.train import train_imagenet
from safetensors import safe_open

import matryoshka
from matryoshka import cli, config
from matryoshka.checkpoint import load_model, published, save_model
from matryoshka.data import WriterConfig
from matryoshka.embeddings import reading
from matryoshka.evaluation import analysis, baseline_methods
from matryoshka.evaluation import options as evaluation
from matryoshka.models import ModelSpec, build
from matryoshka.retrieval.store import Index
from matryoshka.training import session
from matryoshka.training.snapshot import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
LAZY = ["checkpoint", "data", "embeddings", "export", "models", "retrieval", "search_page"]
OPTION_FILES = [
    *sorted((ROOT / "matryoshka").rglob("*options.py")),
    ROOT / "matryoshka" / "runtime.py",
    *(ROOT / "train" / name for name in ("check_data.py", "build_imagenet4k.py", "list_runs.py")),
    ROOT / "inference" / "report.py",
]
PROGRAMS = {**cli.PROGRAMS, **{" ".join(words): p for words, p in cli.ROUTES.items()}}


@pytest.mark.parametrize("name", [name for name, p in PROGRAMS.items() if p.options])
def test_options_are_read_without_torch(name):
    """Otherwise a typo is answered after seconds."""
    module, _, parser = PROGRAMS[name].options.partition(":")
    code = (
        f"import sys; from {module} import {parser}; {parser}(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'scipy', 'matplotlib', 'PIL')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("name", [name for name, p in PROGRAMS.items() if not p.options])
def test_programs_without_separate_options_import_no_torch(name):
    code = f"import sys, {PROGRAMS[name].module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_mistyped_option_of_a_command_is_one_line(name, capsys):
    """And it is answered before a required option is asked for."""
    argv = {"index": ["index", "info"], "data": ["data", "verify"]}.get(name, name.split())
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main([*argv, "--no-such-option=1"])
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("error: unknown option")
    assert "no-such-option" in first


def program_parser(name):
    """The parser of a command such as `retrieve serve`."""
    entry = PROGRAMS[name]
    module, _, parser = (entry.options or f"{entry.module}:parser").partition(":")
    return getattr(importlib.import_module(module), parser)()


def listed(text):
    """The options that a help text lists, in order."""
    names = re.findall(r"^  (?:-\w, )?(--[\w.-]+)", text, re.MULTILINE)
    return [name for name in names if name not in ("--help", "--config-file", "--print-config")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_lists_some_options_and_help_all_lists_all(name, capsys):
    parser = program_parser(name)
    short, long = parser.help_text(), parser.help_text(everything=True)
    assert set(listed(short)) <= set(listed(long))
    for flag, text in (("--help", short), ("--help-all", long)):
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main([*name.split(), flag])
        assert capsys.readouterr().out == f"{text}\n"
    count = len(listed(long))
    if name == "index":  # its commands have a help text each
        assert listed(short) == []
    elif name in ("eval", "data"):
        assert listed(short) == ([] if name == "data" else listed(long))
    elif count > 16:
        assert 8 <= len(listed(short)) <= 16
        assert short.endswith(f"--help-all lists all {count} options.")
    else:
        assert listed(short) == listed(long)


def test_help_all_lists_every_declaration():
    for name, sections in (("train", train_imagenet.SECTIONS), ("write", {"cfg": WriterConfig})):
        expected = [
            f"--{section}.{field.name}"
            for section, declared in sections.items()
            for field in dataclasses.fields(declared)
        ]
        assert listed(program_parser(name).help_text(everything=True)) == expected
        common = [
            f"--{section}.{field.name}"
            for section, declared in sections.items()
            for field in dataclasses.fields(declared)
            if field.metadata["common"]
        ]
        assert listed(program_parser(name).help_text()) == common


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_examples_of_a_help_text_are_commands(name, monkeypatch):
    """They stand before the options, and the program's own parser accepts them."""
    monkeypatch.setenv("COLUMNS", "40")
    text = program_parser(name).help_text()
    before_options = re.split(r"^(?:arguments and )?options$|^\w+s$", text, flags=re.MULTILINE)[0]
    examples = re.findall(r"^    (\S(?:.*\\\n)*.*)$", before_options, re.MULTILINE)
    assert examples, f"{name}: no example"
    for example in examples:
        words = shlex.split(example.replace("\\\n", " "), comments=True)
        if words[0] == "matryoshka":
            route = " ".join(words[1:3])
            command = route if route in PROGRAMS else words[1]
            argv = words[1 + len(command.split()) :]
        else:
            script = next(word for word in words if word.endswith(".py"))
            stem = Path(script).stem
            command = next(n for n, p in PROGRAMS.items() if p.module.endswith(f".{stem}"))
            argv = words[words.index(script) + 1 :]
        program_parser(command).parse_args(argv)


SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("train", "inference")
    for path in (ROOT / folder).glob("*.py")
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_finds_mistakes_before_it_imports_torch(script):
    command = [sys.executable, "-X", "importtime", script, "--no-such-option=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: " in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "scipy", "matplotlib", "sklearn"}


def test_a_missing_file_is_reported_before_torch_is_imported(tmp_path):
    code = (
        "import sys; from matryoshka import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    there = tmp_path / "model.safetensors"
    there.touch()
    for argv, message in (
        (["embed", "--path=no.pt", "--data=x", "--output=y"], "--path no.pt"),
        (["embed", f"--path={there}", "--data=no", "--output=y"], "--data no"),
        (["embed", "--path=timm:resnet18", "--data=no", "--output=y"], "--data no"),
        (["train", "--data.train_dataset=no.beton"], "data.train_dataset=no.beton"),
        (["index", "build", "i", "--embeddings=no"], "--embeddings no"),
        (["retrieve", "serve", "no.index"], "no.index"),
    ):
        command = [sys.executable, "-c", code, *argv]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == f"error: {message}: no such file or folder\n"


def test_the_package_is_imported_without_torch():
    code = (
        "import sys, matryoshka; shown = dir(matryoshka); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules or "
        "not set(matryoshka.__all__) <= set(shown))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_names_of_the_package():
    assert matryoshka.load is published.load_any
    assert matryoshka.Index is Index
    for name in matryoshka.__all__:
        assert getattr(matryoshka, name).__module__.startswith("matryoshka.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = matryoshka.nothing


@pytest.mark.parametrize("wing", LAZY)
def test_lazy_names_exist_and_agree_with_those_for_type_checkers(wing):
    package = importlib.import_module(f"matryoshka.{wing}")
    tree = ast.parse(Path(package.__file__).read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matryoshka.")
        for alias in node.names
    }
    assert imported == set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__class__.__name__ != "module"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_names_that_are_declared_without_their_modules():
    assert reading.DTYPES == evaluation.DTYPES
    assert tuple(baseline_methods.METHODS) == evaluation.METHODS
    assert evaluation.AnalyzeOptions.bins == analysis.BINS


def declarations():
    """Every dataclass of options, of the library and of the programs."""
    modules = [str(path.relative_to(ROOT).with_suffix("")) for path in OPTION_FILES]
    for name in modules:
        prefix = "" if name.startswith("matryoshka/") else "matryoshka."
        module = importlib.import_module(prefix + name.replace("/", "."))
        for value in vars(module).values():
            declared_here = getattr(value, "__module__", None) == module.__name__
            if declared_here and isinstance(value, type) and dataclasses.is_dataclass(value):
                yield value


def test_every_number_has_its_legal_range():
    numbers, unlimited = 0, []
    for section in declarations():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            if "range" not in field.metadata or not re.search(
                r"\b(int|float)\b", str(hints[field.name])
            ):
                continue
            numbers += 1
            limits = field.metadata["range"]
            has_lower = limits.low is not None or limits.above is not None
            has_upper = limits.high is not None or limits.below is not None
            if not (has_lower and has_upper) and not field.metadata["choices"]:
                unlimited.append(f"{section.__name__}.{field.name}")
    assert numbers > 100, "the declarations were not found"
    assert unlimited == [], "declare both ends: option(..., low=1, high=limits.MAX_COUNT)"


def test_options_that_a_resumed_run_may_change():
    neutral = config.neutral_options(train_imagenet.SECTIONS)
    assert neutral == {
        "data.train_dataset",
        "data.val_dataset",
        "data.num_workers",
        "data.in_memory",
        "validation.batch_size",
        "training.batch_size",
        "training.accumulate",
        "training.global_batch_size",
        "training.distributed",
        "training.device",
        "training.resume",
        "training.checkpoint_every_steps",
        "training.checkpoint_every_minutes",
        "training.keep_last",
        "training.hang_timeout",
        "training.skip_limit",
        "training.compile",
        "logging.folder",
        "logging.run_id",
        "logging.log_level",
        "logging.tensorboard",
        "logging.wandb",
        "dist.world_size",
        "dist.address",
        "dist.port",
        "dist.backend",
    }


@pytest.mark.parametrize("run_id", ["../elsewhere", "a/b", ".hidden", ""])
def test_a_run_id_stays_in_its_folder(tmp_path, run_id):
    """Also one that comes from torchrun's environment."""
    with pytest.raises(session.SessionError, match=r"logging\.run_id=.*no leading dot"):
        session.resolve_run(tmp_path, run_id, None, {})


def test_a_run_of_an_older_version_resumes_with_the_defaults_of_newer_options():
    """Options that it does not have had their defaults' effect; data.resident was a number."""
    sections = train_imagenet.SECTIONS
    now = config.flat(config.read(sections, ["--data.resident=0"]))
    older = {name: value for name, value in now.items() if name != "training.distill"}
    run = Checkpoint(Path("run"), {"config": {**older, "data.resident": 0}}, {})
    rules = {
        "neutral": config.neutral_options(sections),
        "defaults": config.default_options(sections),
    }
    session.check_options(run, now, **rules)
    with pytest.raises(session.SessionError, match=r"training.distill was 0.0 and is 0.5;"):
        session.check_options(run, {**now, "training.distill": 0.5}, **rules)


def test_options_of_a_backbone_are_kept_in_the_file(tmp_path):
    def metadata(path):
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["matryoshka"])["model"]

    plain, wide = tmp_path / "plain.safetensors", tmp_path / "wide.safetensors"
    save_model(build(ModelSpec("resnet10", 3, (8,))), plain)
    assert "arch_options" not in metadata(plain)  # as in files from before there were any
    spec = ModelSpec("resnet10", 3, (8,), arch_options={"zero_init_residual": True})
    save_model(build(spec), wide)
    assert metadata(wide)["arch_options"] == {"zero_init_residual": True}
    assert load_model(wide).spec == spec
    assert load_model(plain).spec.arch_options == {}


def test_a_config_file_from_a_pipe_is_read_once(tmp_path, capsys):
    """A pipe has no second content: a pass over the options beforehand must not read it."""
    pipe = tmp_path / "options.yaml"
    os.mkfifo(pipe)
    text = "data: {train_dataset: nowhere, val_dataset: nowhere}\n"
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["train", f"--config-file={pipe}"])
    writer.join(10)
    assert capsys.readouterr().err == "error: nowhere: no such file or folder\n"
