"""Baselines of the MRL paper for one checkpoint, from its features alone, without training.

    python baselines.py --path runs/ff/model.safetensors --train-data train.beton \\
        --val-data val.beton
    python baselines.py --path torchvision:resnet50 --train-data /data/imagenet/train \\
        --val-data /data/imagenet/val --only 1nn,ncm,svd,rand-fs

linear    the checkpoint's own classifiers, at the prefixes that they were trained for
1nn       class of the nearest training image; prefixes are L2-normalised
ncm       nearest class mean of --shots random training images of each class, --draws draws
svd       the classifier W [C, D] of a single head cut to rank K by SVD; the bias stays
svd-1nn   1nn on the projections on the first K right singular vectors of W; K <= min(C, D)
rand-fs   1nn on K random features, --draws draws; the whole feature is evaluated once
rand-lp   a linear probe on K random features, with --weight-decay (matryoshka/evaluation/probe.py)

linear, svd and svd-1nn need data with the classes that the model was trained on; svd and svd-1nn
also need a model with a single head. Without --only, methods that do not apply are skipped.
Values are top-1 %, means over the draws with their standard deviation. In the paper, the row FF has
a separate model for each width; here, FF<width> rows show prefixes of one model.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matryoshka import config
from matryoshka.evaluation.options import baselines_parser as parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import torch
from tqdm import tqdm

from matryoshka import distributed
from matryoshka.checkpoint.options import load_flags
from matryoshka.checkpoint.published import load_any
from matryoshka.data import CenterCrop, Loader, open_dataset
from matryoshka.environment import environment
from matryoshka.evaluation.baseline_methods import (
    METHODS,
    NEED_CLASSES,
    NEED_ONE_HEAD,
    BaselineInputs,
    Split,
)
from matryoshka.evaluation.predict import extract_features
from matryoshka.files import write_atomically
from matryoshka.models import ModelError, NestedModel, widest
from matryoshka.nested import default_dims


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check(args)
    requested = [method for method in METHODS if args.only is None or method in args.only]

    # ---- model and data ----
    train, val = open_dataset(args.train_data), open_dataset(args.val_data)
    check_datasets(train, val)
    model = widest(load_any(args.path, **load_flags(args)))
    dims = prefixes_to_evaluate(args, model)
    # --only makes a method that does not apply an error; otherwise it is skipped with a note.
    methods = [m for m in requested if applies(m, model, (train, val), args.only is not None)]
    device = distributed.pick_device(args.device, 0)
    precision = distributed.pick_precision(args.precision, device)
    model = model.to(device).to(memory_format=torch.channels_last)

    # ---- features ----
    seconds = {}
    splits = {}
    for name, dataset in (("train", train), ("val", val)):
        started = time.perf_counter()
        splits[name] = extract_split(
            model, dataset, args, precision, device
        )  # once for all methods
        seconds[f"features_{name}"] = round(time.perf_counter() - started, 3)
    inputs = BaselineInputs(
        model_name=model.spec.head_name.upper(),
        heads=classifiers(model),
        model_dims=model.dims,
        dims=dims,
        train=splits["train"],
        val=splits["val"],
        shots=args.shots,
        ways=args.ways,
        draws=args.draws,
        seed=args.seed,
        weight_decay=args.weight_decay,
        device=device,
        dtype=torch.float32 if device.type == "mps" else torch.float64,  # MPS lacks float64
    )
    # Methods may take minutes: each line appears at once, even in a pipe.
    report = partial(print, flush=True)
    for note in model.notes:
        report(f"note: {note}")
    report(f"{args.path}: {model.spec.arch}, {model.spec.head_name}")
    report(
        f"train {train.path}: {len(train):,} images; val {val.path}: {len(val):,}, "
        f"{train.num_classes} classes"
    )
    skipped = [m for m in requested if m not in methods]
    if skipped:
        report(
            f"note: skipped {', '.join(skipped)}: they need data with the model's own classes; "
            "svd also needs a single head"
        )

    # ---- methods ----
    rows = {}
    for method in methods:
        started = time.perf_counter()
        found = METHODS[method](inputs)
        if not found:
            report(f"note: {method}: no value for the prefixes {list(dims)}")
        rows |= found
        seconds[method] = round(time.perf_counter() - started, 3)

    # ---- results ----
    report(format_table(rows, dims))
    report("seconds  " + "  ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    results = {
        "methods": rows,
        "dims": list(dims),
        "checkpoint": args.path,
        "arch": model.spec.arch,
        "head": model.spec.head_name,
        "train": str(train.path),
        "val": str(val.path),
        "n_train": len(train),
        "n_val": len(val),
        "classes": train.num_classes,
        "seed": args.seed,
        "draws": args.draws,
        "ways": args.ways,
        "precision": precision,
        "seconds": seconds,
        "environment": environment(),
    }
    write_atomically(args.output, (json.dumps(results, indent=1) + "\n").encode())
    report(f"results  {args.output}")
    return 0


# ---------------------------------------------------------------- checks


def check(args: SimpleNamespace) -> None:
    """ConfigError for more than one process, and for a place that is not writable."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise config.ConfigError("baselines.py runs as one process; start it without torchrun")
    if Path(args.output).is_dir():
        raise config.ConfigError(f"--output {args.output}: is a folder; give the name of a file")
    if not Path(args.output).resolve().parent.is_dir():
        raise config.ConfigError(
            f"--output {args.output}: its folder does not exist; make it first"
        )


def check_datasets(train, val) -> None:
    """Check that both sets have images, two classes or more, and the same labels."""
    for option, dataset in (("--train-data", train), ("--val-data", val)):
        if not len(dataset):
            raise config.ConfigError(f"{option} {dataset.path}: has no images")
        if dataset.labels.min() < 0:
            raise config.ConfigError(
                f"{option} {dataset.path}: has negative labels; write it again with labels of 0 "
                "or more"
            )
    if train.classes and val.classes and train.classes != val.classes:
        raise config.ConfigError(
            f"--val-data {val.path}: its {val.num_classes} classes differ from the "
            f"{train.num_classes} of {train.path}; give two sets with the same class folders"
        )
    if val.num_classes > train.num_classes:
        raise config.ConfigError(
            f"--val-data {val.path}: has {val.num_classes} classes, {train.path} only "
            f"{train.num_classes}"
        )
    if len(set(train.labels.tolist())) < 2:
        raise config.ConfigError(
            f"--train-data {train.path}: has only one class; expected two or more"
        )


def prefixes_to_evaluate(args: SimpleNamespace, model: NestedModel) -> tuple[int, ...]:
    """--dims, or the model's prefixes, or powers of two up to the width of a fixed feature."""
    width = model.dims[-1]
    if args.dims is None:
        return model.dims if len(model.dims) > 1 else default_dims(width, min(8, width))
    dims = args.dims
    if dims[-1] > width:
        shown = ",".join(map(str, dims))
        raise config.ConfigError(
            f"--dims {shown}: larger than the feature width {width} of {args.path}"
        )
    return dims


def applies(method: str, model: NestedModel, datasets: Sequence, requested: bool) -> bool:
    """Whether a method applies to model and data; ModelError if a requested one does not."""
    try:
        if method in NEED_ONE_HEAD and len(model.dims) > 1:
            raise ModelError(
                f"--only {method}: needs a model with one classifier, this is "
                f"{model.spec.head_name}"
            )
        if method in NEED_CLASSES:
            for dataset in datasets:
                model.check_classes(dataset)
    except ModelError:
        if requested:
            raise
        return False
    return True


# ---------------------------------------------------------------- features


def extract_split(
    model: NestedModel, dataset, args: SimpleNamespace, precision: str, device: torch.device
) -> Split:
    """The features that the classifiers see; on the device if they fit half its free memory."""
    crop = CenterCrop(model.preprocessing.size, model.preprocessing.ratio)
    loader = Loader(
        dataset,
        args.batch_size,
        order="sequential",
        crop=crop,
        num_workers=args.workers,
        device=device,
    )
    bar = tqdm(
        loader, desc=dataset.path.name, leave=False, unit="batch", disable=not sys.stderr.isatty()
    )
    features, labels = extract_features(model, bar, len(dataset), precision)
    # A sum is not finite if one of its terms is not.
    if not bool(torch.isfinite(features.sum(0)).all()):
        raise ModelError(
            f"--path {args.path}: its features of {dataset.path} are not finite; use --precision "
            "fp32"
        )
    features = features[:, : model.dims[-1]]  # a fixed feature may be narrower than its trunk
    if device.type == "cuda" and features.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        features = features.to(device)
    return Split(features, labels)


def classifiers(model: NestedModel) -> list:
    """(weight [C, d], bias [C]) of each head."""
    return [
        (head.get_parameter("weight").detach(), head.get_parameter("bias").detach())
        for head in model.head.heads
    ]


# ---------------------------------------------------------------- output


def format_table(rows: Mapping[str, Mapping[str, Any]], dims: Sequence[int]) -> str:
    """Methods x prefixes: top-1 % with the standard deviation over draws; - for a missing value."""
    lines = [["top-1 %", *map(str, dims)]]
    for name, entry in rows.items():
        cells = []
        for d in map(str, dims):
            cell = f"{entry['values'][d]:.2f}" if d in entry["values"] else "-"
            deviation = (entry["std"] or {}).get(d)
            cells.append(cell if deviation is None else f"{cell} ±{deviation:.2f}")
        lines.append([name, *cells])

    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for name, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        aligned.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(aligned)


if __name__ == "__main__":
    raise SystemExit(main())
