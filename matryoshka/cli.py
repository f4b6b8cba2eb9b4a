"""The command `matryoshka`: runs every program by name, and the demo."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from matryoshka import __version__, config


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
    "write": Program("matryoshka.train.write_imagenet", "image folder -> .beton"),
    "data": Program(
        "matryoshka.train.check_data", "info, verify: content and integrity of a .beton"
    ),
    "train": Program(
        "matryoshka.train.train_imagenet",
        "train MRL, MRL-E or a fixed feature",
        "matryoshka.training.options:parser",
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
    rows = {"demo": "the whole pipeline on handwritten digits, a few minutes on a CPU"}
    rows |= {name: program.text for name, program in PROGRAMS.items()}
    lines = "\n".join(f"  {name:10} {text}" for name, text in rows.items())
    head = "usage: matryoshka COMMAND [options]      (COMMAND --help lists its options)"
    return f"{head}\n\n{lines}\n\nmatryoshka {__version__}"


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
    if program.options is not None:
        module, _, parser = program.options.partition(":")
        make_parser = getattr(importlib.import_module(module), parser)
        config.check_first(make_parser(), argv)
    return importlib.import_module(program.module).main(argv) or 0


# Digits are not photos: no mirror images, mild crops, small images, and evaluation on whole images.
DEMO_OPTIONS = [
    "--model.arch=resnet10",
    "--training.epochs=8",
    "--training.batch_size=64",
    "--lr.lr=0.1",
    "--training.weight_decay=5e-4",
    "--training.label_smoothing=0.1",
    "--data.flip=0",
    "--data.scale=0.7,1",
    "--data.ratio=0.9,1.1",
    "--resolution.min_res=32",
    "--resolution.max_res=32",
    "--validation.resolution=32",
    "--validation.crop_ratio=1",
    "--validation.lr_tta=0",
    "--logging.log_level=1",
]
DEMO_BASELINES = (8, 512)


@config.program
def demo(argv: Sequence[str]) -> int:
    """Handwritten digits: image folder -> .beton -> training -> accuracy of every prefix -> report.

    Baselines are models trained for one width alone.
    """
    from matryoshka.data.sources import write_digits_folder
    from matryoshka.files import write_atomically
    from matryoshka.report import accuracy_table, plot_accuracy

    if len(argv) > 1 or any(a.startswith("-") for a in argv):
        print("usage: matryoshka demo [FOLDER]      (default: runs/demo; replaces an earlier demo)")
        return 0 if argv[0] in ("-h", "--help") else 2
    started = time.perf_counter()
    folder = Path(argv[0] if argv else "runs/demo")
    runs = {"mrl": ["--model.mrl=1"]}
    for width in DEMO_BASELINES:
        runs[f"ff{width}"] = [f"--model.fixed_feature={width}"]
    # Runs are never replaced by training: an earlier demo would be an error.
    for name in ("images", *runs):
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)

    # ---- data ----
    step("1/6  handwritten digits as an image folder", folder / "images")
    write_digits_folder(folder / "images")
    step("2/6  image folder -> .beton")
    for split in ("train", "val"):
        options = [
            f"--cfg.data_dir={folder / 'images' / split}",
            f"--cfg.write_path={folder / split}.beton",
            "--cfg.write_mode=jpg",
            "--cfg.max_resolution=64",
            "--cfg.jpeg_quality=95",
        ]
        if status := run("write", options):
            return status

    # ---- training ----
    data = [f"--data.train_dataset={folder}/train.beton", f"--data.val_dataset={folder}/val.beton"]
    for name, model in runs.items():
        step(f"3/6  train {name}", folder / name)
        run_folder = [f"--logging.folder={folder}", f"--logging.run_id={name}"]
        # A run that was stopped (status 75) ends the demo, too.
        if status := run("train", [*DEMO_OPTIONS, *model, *data, *run_folder]):
            return status

    # ---- evaluation ----
    step("4/6  accuracy of every prefix on the held-out digits")
    results = {}
    for name in runs:
        output = folder / name / "results.json"
        options = [
            f"--path={folder / name / 'model.safetensors'}",
            f"--data-root={folder}/val.beton",
            f"--output={output}",
        ]
        if name == "mrl":
            options += ["--save_logits", "--save_gt"]  # for the analyses
        if status := run("eval", options):
            return status
        results[name] = json.loads(output.read_text())

    # The rows of the baselines' widths also show the baselines' accuracy.
    prefixes = {int(d): values for d, values in results["mrl"]["prefixes"].items()}
    for width in DEMO_BASELINES:
        baseline = results[f"ff{width}"]["prefixes"][str(width)]
        prefixes[width] |= {"ff_top1": baseline["top1"], "ff_top5": baseline["top5"]}
    summary = results["mrl"] | {
        "prefixes": {str(d): values for d, values in prefixes.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_atomically(folder / "results.json", (json.dumps(summary, indent=1) + "\n").encode())
    images = summary["images"]
    plot_accuracy(
        folder / "accuracy.png", prefixes, f"Handwritten digits, {images} held-out images", images
    )

    # ---- analyses and report ----
    mrl = folder / "mrl"
    model = f"--path={mrl / 'model.safetensors'}"
    step("5/6  analyses of the predictions, baselines, Grad-CAM")
    run("analyze", [f"--results={mrl / 'results.json'}"])
    sets = [f"--train-data={folder}/train.beton", f"--val-data={folder}/val.beton"]
    run("baselines", [model, *sets, f"--output={mrl / 'baselines.json'}"])
    maps = f"--output={mrl / 'gradcam'}"
    run("gradcam", [model, f"--data={folder}/val.beton", maps, "--images=4"])
    step("6/6  HTML report")
    files = [str(folder / name / "results.json") for name in runs]
    page = [f"--output={folder / 'report.html'}", "--title=Handwritten digits"]
    run("report", [f"--run={mrl}", "--results", *files, *page])

    step(f"done in {time.perf_counter() - started:.0f} s")
    print(accuracy_table(prefixes))
    print("FF: a separate model trained for that width alone\n")
    outputs = {
        "results": "results.json",
        "plot": "accuracy.png",
        "model": "mrl/model.safetensors",
        "report": "report.html",  # the last line: what to open
    }
    for kind, file in outputs.items():
        print(f"{kind:8} {folder / file}")
    return 0


def step(title: str, output: Path | None = None) -> None:
    """Print the heading of a step."""
    target = f" -> {output}" if output else ""
    print(f"\n== {title}{target}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
