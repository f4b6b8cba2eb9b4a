"""The code blocks of README.md and docs/: every one is run, or its options are parsed.

Commands run in one process, on a few small photos, with options appended that make them fast. What
needs several processes, ImageNet, a network or a server is parsed by the program's own parser, so
that a renamed option is found. A block of an unknown kind is an error.
"""

import contextlib
import importlib
import os
import re
import shlex
import shutil
import string
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from photo_workspace import write_workspace

from matryoshka import cli
from matryoshka.training import ssl_options
from matryoshka.training.sweep_file import Parameter, read_sweep

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("results.md", "code_map.md")
PAGES = [ROOT / "README.md"]
PAGES += [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in GENERATED]

LANGUAGES = ("sh", "python", "yaml", "text")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PARSED_ONLY = {
    r"\btorchrun\b": "several processes",
    r"/data/|IMAGENET|imagenet21k|ImageNet": "ImageNet",
    r"\bserve\b": "runs until it is stopped",
    r"lancedb": "a database of its own; tests/retrieval/test_lance.py runs it",
    r"matryoshka\.fit\(": "takes its minutes; tests/fitting/test_fit.py runs it",
    r"(dataset=|--data )(cifar|stl|tiny|hf:)": "a download; see tests/data/test_small_sets.py",
    r"labels\.csv|resnet34": "tests/fitting/test_fit.py runs the like",
    r"import transformers|from (lightly|transformers)": "tests/data/test_trainers.py runs it",
    r"matryoshka sweep": "trains many models; tests/training/test_sweeps.py runs it",
    r"\badapter|\badapt\b": "needs hundreds of photos; tests/inference/test_adapt.py runs it",
    r"licence": "a column that the reader has added",
}
SHELL_WORDS = ("curl", "source", "cd", "trap", "wait", "export")
# Options that make a command fast, or fit it to 21 photos.
FAST = {
    "fit": ["--model.arch=resnet10", "--training.epochs=1", "--training.batch_size=8"],
    "train": [
        "--training.epochs=1",
        "--training.batch_size=8",
        "--resolution.min_res=32",
        "--resolution.max_res=32",
        "--validation.resolution=32",
        "--training.device=cpu",
        "--data.num_workers=1",
    ],
    "vqvae": ["--training.steps=2", "--training.batch_size=8", "--training.device=cpu"],
    "retrieve": ["--batches=1"],
    "retrieve --sweep": ["--target-recall=0.05"],
    "baselines": ["--shots=1", "--draws=1"],
    "analyze": ["--splits=2"],
    "export": ["--no-latency"],
    "dims": ["--no-latency"],
}


class Block(NamedTuple):
    """A code block. place: `page:line`."""

    place: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(f"{page.name}:{line}", match[1], match[2]))
    return found


def command_lines(block: Block) -> list[str]:
    """The commands of a shell block, with variables of the block replaced."""
    variables: dict[str, str] = {}
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        command = string.Template(line).safe_substitute(variables)
        assigned = re.fullmatch(r'(\w+)=("?)(.*)\2', command)
        if assigned:
            variables[assigned[1]] = assigned[3]
        elif command and not command.startswith("#"):
            found.append(command)
    return found


# ---------------------------------------------------------------- parsing


def parser_of(program: str):
    """The parser of a program file such as train/train_imagenet.py."""
    stem = Path(program).stem
    for entry in cli.PROGRAMS.values():
        if entry.module.endswith(f".{stem}") and entry.options:
            module, _, name = entry.options.partition(":")
            return getattr(importlib.import_module(module), name)()
    (folder,) = [f for f in ("train", "inference") if (ROOT / f / f"{stem}.py").is_file()]
    return importlib.import_module(f"matryoshka.{folder}.{stem}").parser()


def program_call(words: list[str]) -> tuple[str, list[str]]:
    """(program file, its options) of `python x.py ...`, `torchrun ... x.py ...` and the like."""
    position = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[position], [word for word in words[position + 1 :] if word != "&"]


def parse(parser, argv: list[str]) -> None:
    with contextlib.suppress(SystemExit):  # of --help; mistakes are ConfigErrors
        parser.parse_args(argv)


def parse_command(words: list[str]) -> None:
    """Check a command that is not a program of ours, or parse the options of one that is."""
    if words[0] == "matryoshka":
        route = cli.ROUTES.get(tuple(words[1:3]))
        if route is not None:
            module, _, name = route.options.partition(":")
            return parse(getattr(importlib.import_module(module), name)(), words[3:])
        return parse(parser_of(cli.PROGRAMS[words[1]].module.rpartition(".")[2]), words[2:])
    if words[0] in ("python", "torchrun", "srun"):
        program, argv = program_call(words)
        return parse(parser_of(program), argv)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"\[(.*)\]", " ".join(words))
        named = {name for text in extras for name in text.split(",")}
        assert named <= set(project["optional-dependencies"])
    elif words[0] == "./write_imagenet.sh":
        assert (ROOT / words[0]).is_file()
        assert len(words) == 4  # size, share, quality
    else:
        assert words[0] in SHELL_WORDS, f"unknown command {words[0]!r}: add a way to check it"
    return None


def parse_yaml(block: Block) -> None:
    """A sweep file; or the call of a program, as a list of words or as a shell command."""
    if re.search(r"^parameters:", block.text, re.MULTILINE):
        path = Path("sweep.yaml")
        path.write_text(block.text)
        sweep = read_sweep(path)
        given = [f"--{p.name}={p.value(p.grid()[0])}" for p in sweep.parameters if is_choice(p)]
        return parse(parser_of(cli.PROGRAMS[sweep.program].module.rpartition(".")[2]), given)
    text = block.text.replace("\\\n", " ")
    found = re.search(r"train/train_imagenet\.py(.*?)(\]|\Z)", text, re.DOTALL)
    assert found is not None, f"{block.place}: no program to check"
    return parse(parser_of("train_imagenet.py"), re.split(r"[\s,]+", found[1].strip(", \n")))


def is_choice(parameter: Parameter) -> bool:
    return parameter.domain().kind in ("choice", "constant")


# ---------------------------------------------------------------- running


def why_not_run(text: str) -> str | None:
    return next((why for mark, why in PARSED_ONLY.items() if re.search(mark, text)), None)


def run_command(words: list[str]) -> None:
    """Run a command of ours in this process."""
    if words[0] == "matryoshka":
        name = words[1]
        fast = FAST.get(name, []) + (FAST["retrieve --sweep"] if "--sweep" in words else [])
        argv = [*words[1:], *fast]
        main = cli.main
    else:
        program, argv = program_call(words)
        folder = Path(program).parent.name
        main = importlib.import_module(f"matryoshka.{folder}.{Path(program).stem}").main
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    assert not status, f"status {status}"


def run_shell(block: Block) -> None:
    for line in command_lines(block):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        try:
            parse_command(words)
            ours = words[0] in ("matryoshka", "python")
            if ours and why_not_run(" ".join(words)) is None:
                run_command(words)
        except Exception as error:
            raise AssertionError(f"{block.place}: {line}: {error}") from error


def run_python(block: Block, names: dict) -> None:
    code = compile(block.text, block.place, "exec")
    if why_not_run(block.text) is None:
        exec(code, names)


def run_page(page: Path, workspace: Path) -> None:
    names: dict = {}
    with contextlib.chdir(workspace):
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{block.place}: name the language of the block"
            if block.language == "sh":
                run_shell(block)
            elif block.language == "python":
                run_python(block, names)
            elif block.language == "yaml":
                parse_yaml(block)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the commands of README.md have run."""
    root = tmp_path_factory.mktemp("readme")
    write_workspace(root)
    run_page(ROOT / "README.md", root)
    return root


def test_readme(trained):
    run = trained / "trainlogs/first"
    for name in ("model.safetensors", "results.json", "analysis.json", "report.html"):
        assert (run / name).is_file()
    assert (trained / "photos.index/index.json").is_file()


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_page(page, trained, tmp_path):
    workspace = tmp_path / "workspace"
    # Links, not copies of models: programs replace files, they do not change them.
    shutil.copytree(trained, workspace, copy_function=os.link)
    for made_by_the_page in ("embeddings", "photos.index", "runs"):
        shutil.rmtree(workspace / made_by_the_page)
    run_page(page, workspace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_fenced(page):
    """An indented block has no language, and this test would not see it."""
    outside = FENCE.sub("", page.read_text(encoding="utf-8"))
    indented = re.findall(r"\n\n( {4}\S.*)", outside)
    assert indented == []


def test_a_renamed_option_is_found():
    for line in (
        "matryoshka train --data.training_set=a",
        "torchrun --nproc_per_node=8 train/train_imagenet.py --model.mlr=1",
        "matryoshka retrieve serve photos.index --prot 80",
        "make tset",
        "pip install '.[retrieve]'",
        "rm -r photos",
    ):
        with pytest.raises(AssertionError, match="page:1"):
            run_shell(Block("page:1", "sh", line))
    good = "train/train_imagenet.py --training.resume=auto"
    parse_yaml(Block("page:1", "yaml", f"command: [torchrun, {good.replace(' ', ', ')}]"))
    with pytest.raises(ValueError, match="resum"):
        parse_yaml(Block("page:1", "yaml", "run: train/train_imagenet.py --training.resum=auto"))


# Flags of other programs that the pages name.
OTHERS = {
    "--rdzv-id",
    "--nnodes",
    "--max-restarts",
    "--export",
    "--index-url",
}


def known_options() -> set[str]:
    """All options of all programs, as their help texts show them, and of scripts/."""
    programs = {**cli.PROGRAMS, **cli.ROUTES}
    parsers = [parser_of(entry.module.rpartition(".")[2]) for entry in programs.values()]
    texts = [parser.help_text(everything=True) for parser in parsers]
    texts.append(parser_of("build_imagenet4k").help_text(everything=True))
    texts += [ssl_options.parser(face).help_text(everything=True) for face in ssl_options.FACES]
    texts += [path.read_text() for path in (ROOT / "scripts").glob("*.py")]
    return set(re.findall(r"(--[\w.-]*\w)", "\n".join(texts))) | {"--help-all"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    inline = " ".join(re.findall(r"`([^`]*)`", text))
    named = set(re.findall(r"(?<![\w-])(--[a-z][\w.-]*\w)(?![\w.*…-])", inline))
    assert named - known_options() - OTHERS == set()
