"""Export a model: ONNX, torch.export, TorchScript, int8; verified and timed.

    matryoshka export --checkpoint model.safetensors --verify --images photos
    matryoshka export --checkpoint model.safetensors --format onnx,int8 \\
        --calibration photos/train --eval-data photos/val
    python export_models.py --checkpoint model.safetensors --model_type vit \\
        --output_dir exported_models

Writes <name>.onnx, <name>.pt2, <name>.pt (TorchScript), <name>_int8.onnx to --output_dir, where
<name> is that of the architecture, with _adapted behind it for --adapter and _d64 for
--truncate-dim 64. Nothing is written
unless all formats can be exported and, with --verify, agree with the model. docs/export.md
describes the files and runs one without this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from matryoshka import config
from matryoshka.export.options import ExportError
from matryoshka.export.options import export_parser as parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import torch

from matryoshka.checkpoint.adapter_file import add_adapter
from matryoshka.checkpoint.options import load_flags
from matryoshka.checkpoint.published import load_any
from matryoshka.data import BetonFile, CenterCrop, ImageFolder, Loader, open_dataset
from matryoshka.data.sources import open_images
from matryoshka.evaluation.run_images import images_of_run, run_with_images
from matryoshka.export.formats import ENDINGS, WRITERS, open_written
from matryoshka.export.graph import Deployed, Graph, Run, record
from matryoshka.export.images import sample_images
from matryoshka.export.int8 import quantise
from matryoshka.export.latency import BLOCKS, latencies
from matryoshka.export.packages import check_packages
from matryoshka.export.torchscript import NOTE
from matryoshka.export.verify import largest_difference
from matryoshka.files import check_writable, write_atomically
from matryoshka.models import TIMM, NestedModel

VERIFIED = (1, 7)  # batch sizes; 7 is not that of the recorded example
TIMED = (1, 32)
BATCH = 64  # of calibration and evaluation


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()

    # ---- everything that can be refused, before work that takes time ----
    model = load(args)
    source = Deployed(model, args.truncate_dim, args.with_preprocessing)
    files = file_names(args, model)
    eval_data = None
    if args.eval_data:
        eval_data = open_dataset(args.eval_data)
        model.check_classes(eval_data)
    for path in filter(None, (args.images, args.calibration)):
        open_images([path])  # a folder without images is refused here
    try:
        check_writable(Path(args.output_dir))
    except OSError as error:
        raise config.ConfigError(f"--output_dir {args.output_dir}: {error.strerror}") from None

    # ---- export, verify, write ----
    print("\n".join(summary(args, source)), flush=True)
    contents = export(args, record(source, args.batch_size))
    runs = {name: open_written(name, contents[name], threads) for name in contents}
    if args.verify:
        verify(args, source, runs)
    for name, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, contents[name])
        print(f"written  {path}  {len(contents[name]) / 1e6:.2f} MB")

    # ---- what the files cost ----
    if eval_data is not None:
        print(accuracy_lines(source, runs, eval_data), flush=True)
    if not args.no_latency:
        chosen = {name: runs[name] for name in files}
        print(latency_lines(source, chosen, sorted({*TIMED, args.batch_size}), threads))
    return 0


# ---------------------------------------------------------------- options


def check(args: SimpleNamespace) -> None:
    """ConfigError or ExportError for options that contradict each other, and missing packages."""
    if "int8" in args.format and not args.calibration:
        raise config.ConfigError("--format int8 needs --calibration: images like those in use")
    if "int8" not in args.format:
        for name in ("calibration", "eval_data"):
            if getattr(args, name):
                flag = "--" + name.replace("_", "-")
                raise config.ConfigError(f"{flag} is for --format int8; add it")
    if args.images and not args.verify:
        raise config.ConfigError("--images is for --verify; add it")
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise config.ConfigError(f"--output_dir {args.output_dir}: is not a folder")
    check_packages(args.format)


def load(args: SimpleNamespace) -> NestedModel:
    """The model of --checkpoint, with the size of --img_size."""
    model = load_any(args.checkpoint, option="--checkpoint", **load_flags(args))
    arch = model.spec.arch
    if args.model_type is not None and args.model_type != arch:
        raise ExportError(
            f"--model_type {args.model_type}: {args.checkpoint} is a {arch}; "
            f"use --model_type {arch}, or leave it out"
        )
    if args.adapter:
        if not model.one_pass:
            raise ExportError(
                f"--adapter {args.adapter}: {args.checkpoint} is a family of widths, whose members "
                "have embeddings of their own; export one of them"
            )
        add_adapter(model, args.adapter, args.checkpoint)
    if args.img_size is not None:
        model.preprocessing = replace(model.preprocessing, size=args.img_size)
    return model


def file_names(args: SimpleNamespace, model: NestedModel) -> dict[str, Path]:
    """The file of each format. ExportError for one that exists, without --overwrite."""
    stem = model.spec.arch.removeprefix(TIMM)
    if args.adapter:
        stem = f"{stem}_adapted"
    if args.truncate_dim is not None:
        stem = f"{stem}_d{args.truncate_dim}"
    files = {name: Path(args.output_dir) / f"{stem}{ENDINGS[name]}" for name in args.format}
    existing = [path for path in files.values() if path.exists()]
    if existing and not args.overwrite:
        raise ExportError(f"{existing[0]}: exists; add --overwrite, or give another --output_dir")
    return files


def summary(args: SimpleNamespace, source: Deployed) -> list[str]:
    """Lines about the model and the files."""
    model = source.model
    lines = [f"note: {note}" for note in model.notes]
    dims = ", ".join(map(str, model.dims))
    lines.append(
        f"{args.checkpoint}: {model.spec.arch}, {model.spec.num_classes} classes, "
        f"embedding of {source.embedding_dim} numbers, logits of prefixes {dims}"
    )
    if model.adapter is not None:
        lines.append(f"{args.adapter}: {model.adapter.summary()}")
    lines.append(f"input: {source.input_text()}")
    if "torchscript" in args.format:
        lines.append(f"note: {NOTE}")
    return lines


# ---------------------------------------------------------------- export


def export(args: SimpleNamespace, graph: Graph) -> dict[str, bytes]:
    """The contents of the files by format; with int8 also that of the float32 ONNX file."""
    source = graph.source
    contents = {}
    for name, write in WRITERS.items():
        if name in args.format or (name == "onnx" and "int8" in args.format):
            contents[name] = write(graph)
    if "int8" in args.format:
        preprocessing = source.model.preprocessing
        photos = open_images([args.calibration])
        images = sample_images(photos, args.calibration_images, preprocessing)
        print(f"int8: calibrated on {len(images)} images of {args.calibration}", flush=True)
        batches = (source.inputs(part) for part in images.split(BATCH))
        contents["int8"] = quantise(contents["onnx"], batches)
    return contents


def verify(args: SimpleNamespace, source: Deployed, runs: Mapping[str, Run]) -> None:
    """Print the largest difference of every format; ExportError for one beyond --tolerance."""
    batches = sorted({*VERIFIED, args.batch_size})
    images, text = verification_images(args, source, batches[-1])
    shown = ", ".join(map(str, batches))
    print(f"verify: {text}, batch {shown}; largest |file - model| / (1 + |model|):")
    beyond = []
    for name in args.format:
        largest = max(largest_difference(runs[name], source, images[:n]) for n in batches)
        verdict = "no limit" if name == "int8" else f"limit {args.tolerance:g}"
        print(f"  {name:12}{largest:.2e}  ({verdict})", flush=True)
        if name != "int8" and not largest <= args.tolerance:
            beyond.append(f"{name} differs by {largest:.2e}")
    if beyond:
        raise ExportError(
            f"--verify: {', '.join(beyond)}, more than --tolerance {args.tolerance:g}; "
            "nothing was written"
        )


def verification_images(
    args: SimpleNamespace, source: Deployed, count: int
) -> tuple[torch.Tensor, str]:
    """`count` images for --verify, and what they are: those of --images, else test images of the
    checkpoint's run, else noise.
    """
    run = run_with_images(args.checkpoint)
    if args.images:
        dataset = open_images([args.images])
        text = f"images of {args.images}"
    elif run is not None:
        try:
            dataset = images_of_run(run)[1]
        except config.ConfigError:  # moved since the training
            return source.noise(count), f"noise (the test images of {run} are not here any more)"
        text = f"test images of {run}"
    else:
        return source.noise(count), "noise"
    images = sample_images(dataset, count, source.model.preprocessing)
    return images[torch.arange(count) % len(images)], text  # a few images may repeat


# ---------------------------------------------------------------- results


def accuracy_lines(
    source: Deployed, runs: Mapping[str, Run], dataset: BetonFile | ImageFolder
) -> str:
    """A table of the accuracy of every prefix, before and after quantisation."""
    from matryoshka.evaluation.accuracy import PrefixAccuracy  # imports torchmetrics: seconds

    preprocessing = source.model.preprocessing
    crop = CenterCrop(preprocessing.size, preprocessing.ratio)
    metrics = {name: PrefixAccuracy(source.model.dims) for name in ("onnx", "int8")}
    for batch in Loader(dataset, BATCH, order="sequential", crop=crop):
        inputs = source.inputs(batch.images)
        for name, metric in metrics.items():
            metric.update(runs[name](inputs)[1], batch.labels)
    before, after = (metrics[name].compute() for name in ("onnx", "int8"))
    lines = [
        f"top-1 % on {len(dataset):,} images of {dataset.path}",
        "prefix   float32     int8   change",
    ]
    for d in source.model.dims:
        old, new = before[d]["top1"], after[d]["top1"]
        lines.append(f"{d:6d}  {old:8.2f} {new:8.2f} {new - old:+8.2f}")
    return "\n".join(lines)


def latency_lines(
    source: Deployed, runs: Mapping[str, Run], batches: Sequence[int], threads: int
) -> str:
    """A table of latencies: for each batch size, time over that of the model, and milliseconds."""
    columns = []
    with torch.inference_mode():
        for batch in batches:
            inputs = source.inputs(source.noise(batch))
            functions = {"eager": source.logits, **runs}
            calls = {name: partial(function, inputs) for name, function in functions.items()}
            columns.append(latencies(calls))
    lines = [
        f"latency on the CPU, median of {BLOCKS} blocks in turns, {threads} threads: "
        "time over eager, ms per batch",
        " " * 12 + "".join(f"{f'batch {batch}':>20}" for batch in batches),
    ]
    for name in columns[0]:
        cells = []
        for seconds in columns:
            ratio = seconds[name] / seconds["eager"]
            cells.append(f"{ratio:9.2f}x {1000 * seconds[name]:9.2f}")
        lines.append(f"{name:12}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
