"""The command `matryoshka`: runs every program by name, and the demo."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from matryoshka import __version__, config, json_files
from matryoshka.files import read_regular
from matryoshka.interrupts import importing


class Program(NamedTuple):
    """A subcommand: the module with main(argv), a description, and its options.

    options: `module:function`; the function returns a parser. Checking them first answers `--help`
    and a mistyped option before the program imports torch, which takes two seconds. None: the
    program itself imports quickly.
    """

    module: str
    text: str
    options: str | None = None


PROGRAMS = {
    "fit": Program(
        "matryoshka.fitting",
        "photos -> searchable model, in a time that you choose",
        "matryoshka.fitting:parser",
    ),
    "write": Program("matryoshka.train.write_imagenet", "image folder -> .beton"),
    "data": Program(
        "matryoshka.train.check_data",
        "info, verify: content and integrity of data and embeddings",
    ),
    "train": Program(
        "matryoshka.train.train_imagenet",
        "train MRL, MRL-E or a fixed feature",
        "matryoshka.training.options:parser",
    ),
    "cifar": Program(
        "matryoshka.train.train_cifar10",
        "train small nets and vision transformers on CIFAR-10 and the like",
        "matryoshka.training.cifar_options:parser",
    ),
    "ssl": Program(
        "matryoshka.train.train_ssl",
        "train an encoder without labels, every prefix of it",
        "matryoshka.training.ssl_options:parser",
    ),
    "sweep": Program(
        "matryoshka.train.sweep", "search for options: a sweep file of W&B, with Optuna"
    ),
    "vqvae": Program(
        "matryoshka.train.train_vqvae",
        "a VQ-VAE whose encoder cuts small images into tokens",
        "matryoshka.training.vqvae_options:parser",
    ),
    "runs": Program("matryoshka.train.list_runs", "table of the training runs in a folder"),
    "probe": Program(
        "matryoshka.train.linear_probe",
        "nested classifiers on a frozen backbone",
        "matryoshka.evaluation.probe_options:parser",
    ),
    "eval": Program(
        "matryoshka.inference.pytorch_inference",
        "accuracy of every prefix of a checkpoint",
        "matryoshka.evaluation.options:eval_parser",
    ),
    "dims": Program(
        "matryoshka.inference.compare_dims",
        "every dim of a model: accuracy, cost, confusion matrices, maps",
        "matryoshka.evaluation.dims_options:dims_parser",
    ),
    "adapt": Program(
        "matryoshka.inference.adapt",
        "good prefixes for the embeddings of any frozen encoder",
        "matryoshka.training.adapter_options:adapt_parser",
    ),
    "embed": Program(
        "matryoshka.inference.embed",
        "a data set's embeddings as memory-mapped arrays",
        "matryoshka.evaluation.options:embed_parser",
    ),
    "index": Program(
        "matryoshka.inference.index",
        "embeddings as an index on disk: build, add, delete, compact, info",
        "matryoshka.retrieval.options:index_parser",
    ),
    "retrieve": Program(
        "matryoshka.inference.retrieve",
        "nearest neighbours, measured; serve: a page to try an index",
        "matryoshka.retrieval.options:retrieve_parser",
    ),
    "analyze": Program(
        "matryoshka.inference.analyze",
        "cascades, oracle, superclasses, calibration of saved predictions",
        "matryoshka.evaluation.options:analyze_parser",
    ),
    "gradcam": Program(
        "matryoshka.inference.gradcam",
        "Grad-CAM heat maps of every prefix",
        "matryoshka.evaluation.options:gradcam_parser",
    ),
    "baselines": Program(
        "matryoshka.inference.baselines",
        "1-NN, class means, SVD, random features of a checkpoint",
        "matryoshka.evaluation.options:baselines_parser",
    ),
    "export": Program(
        "matryoshka.inference.export_models",
        "a model as ONNX, torch.export, TorchScript or int8 file",
        "matryoshka.export.options:export_parser",
    ),
    "report": Program("matryoshka.inference.report", "one HTML page that shows a model"),
}
# Commands of two words.
ROUTES = {
    ("retrieve", "serve"): Program(
        "matryoshka.inference.serve",
        "a page to try an index",
        "matryoshka.search_page.options:serve_parser",
    ),
}


def usage() -> str:
    """The list of subcommands."""
    rows = {"demo": "fit on handwritten digits, two minutes on a CPU"}
    rows |= {name: program.text for name, program in PROGRAMS.items()}
    lines = "\n".join(f"  {name:10} {text}" for name, text in rows.items())
    head = "usage: matryoshka COMMAND [options]      (COMMAND --help lists its options)"
    return f"{head}\n\n{lines}\n\nmatryoshka {__version__}"


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of the command `matryoshka`; its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    command, rest = argv[0], argv[1:]
    if command == "--version":
        print(__version__)
        return 0
    if command == "demo":
        return demo(rest)
    if command not in PROGRAMS:
        near = get_close_matches(command, ["demo", *PROGRAMS], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        print(f"error: unknown command {command!r}{hint}; see matryoshka --help", file=sys.stderr)
        return 2
    return run(command, rest)


@config.program
def run(command: str, argv: Sequence[str]) -> int:
    """Run a subcommand; its exit status."""
    program = PROGRAMS[command]
    first = argv[0] if argv else ""
    if (command, first) in ROUTES:
        program = ROUTES[command, first]
        argv = argv[1:]
    with importing():
        if program.options is not None:
            module, _, parser = program.options.partition(":")
            make_parser = getattr(importlib.import_module(module), parser)
            config.check_first(make_parser(), argv)
        start = importlib.import_module(program.module).main
    return start(argv) or 0


# Digits are not photos: no mirror images, mild crops. Prefixes from one number on, so that the
# curve of accuracies has a shape: eight numbers are enough for ten digits.
DEMO_OPTIONS = {
    "model.arch": "resnet10",
    "model.dims": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    "data.flip": 0.0,
    "data.scale": (0.7, 1.0),
    "data.ratio": (0.9, 1.1),
    "training.compile": "0",
}
DEMO_MINUTES = 2.0


@config.program
def demo(argv: Sequence[str]) -> int:
    """`fit` on handwritten digits; an earlier demo is replaced, an interrupted one resumed."""
    with importing():
        from matryoshka.data.sources import write_digits_folder
        from matryoshka.fitting import STATE, FitError, fit

    if len(argv) > 1 or any(a.startswith("-") for a in argv):
        print("usage: matryoshka demo [FOLDER]      (default: runs/demo; replaces an earlier demo)")
        return 0 if argv[0] in ("-h", "--help") else 2
    folder = Path(argv[0] if argv else "runs/demo")
    photos = folder.with_name(f"{folder.name}-photos")
    state = folder / STATE
    if folder.exists() and not state.exists():
        raise FitError(f"{folder}: exists and is not a demo; give another folder")
    if state.exists():
        try:
            before, _ = json_files.decode(read_regular(state))
        except json_files.JsonFileError as error:
            raise FitError(f"{state}: damaged: {error}; otherwise remove its folder") from None
        if "seconds" in before:
            shutil.rmtree(folder)
    shutil.rmtree(photos, ignore_errors=True)
    write_digits_folder(photos)
    print("scikit-learn's handwritten digits as photos; on your own: matryoshka fit PHOTOS\n")
    fit(
        photos,
        minutes=DEMO_MINUTES,
        output=folder,
        options=DEMO_OPTIONS,
        report=lambda line: print(line, flush=True),
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
