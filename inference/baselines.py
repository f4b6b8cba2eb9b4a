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

With --protocol frozen, what the features of an encoder are worth that was trained without labels:

knn       weighted vote of the 20 and of the 200 nearest training images, temperature 0.07
map       mAP@10 of the nearest training images, in percent
lp        a linear probe of each prefix, fitted until its gradient is small; the gradient is shown
ncm       as above
pca-, rand-, pixels-    the same of PCA to K numbers (of the training images' features), of K random
          features (--draws draws), and of all pixels of copies of 32 x 32 pixels, less their mean

This protocol also takes two folders of matryoshka embed, without --path:

    python baselines.py --protocol frozen --train-data emb/train --val-data emb/val
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matryoshka import config
from matryoshka.evaluation.options import PROTOCOLS
from matryoshka.evaluation.options import baselines_parser as parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import numpy as np
import torch
from tqdm import tqdm

from matryoshka import devices, distributed
from matryoshka.checkpoint.options import load_flags
from matryoshka.checkpoint.published import load_any
from matryoshka.data import CenterCrop, Loader, open_dataset
from matryoshka.embeddings import labels_like, open_embeddings
from matryoshka.environment import count_in, environment
from matryoshka.evaluation.baseline_methods import (
    METHODS,
    NEED_CLASSES,
    NEED_ONE_HEAD,
    BaselineInputs,
    Split,
)
from matryoshka.evaluation.frozen_methods import FROZEN_METHODS, NEED_PIXELS, PIXEL_SIDE
from matryoshka.evaluation.predict import extract_features
from matryoshka.files import write_atomically
from matryoshka.models import ModelError, NestedModel, widest
from matryoshka.nested import default_dims

ALL_METHODS = {**METHODS, **FROZEN_METHODS}
WHY_SKIPPED = {  # by whether embeddings are the input
    False: "they need data with the model's own classes; svd also needs a single head",
    True: "they need a model with images; give --path",
}


@dataclass(frozen=True)
class Subject:
    """What is evaluated: its features, the methods that apply, and facts for the results."""

    inputs: BaselineInputs
    methods: list[str]
    facts: dict[str, Any]
    notes: list[str]
    seconds: dict[str, float]


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check(args)
    requested = [method for method in PROTOCOLS[args.protocol] if not args.only]
    requested += [method for method in ALL_METHODS if method in (args.only or ())]
    if args.path is None:
        subject = of_embeddings(args, requested)
    else:
        subject = of_model(args, requested)
    inputs, methods, seconds = subject.inputs, subject.methods, subject.seconds
    dims = inputs.dims

    # Methods may take minutes: each line appears at once, even in a pipe.
    report = partial(print, flush=True)
    for note in subject.notes:
        report(f"note: {note}")
    facts = subject.facts
    report(f"{facts['checkpoint']}: {facts['arch']}, {facts['head']}")
    report(
        f"train {facts['train']}: {facts['n_train']:,} images; val {facts['val']}: "
        f"{facts['n_val']:,}, {facts['classes']} classes"
    )
    skipped = [m for m in requested if m not in methods]
    if skipped:
        report(f"note: skipped {', '.join(skipped)}: {WHY_SKIPPED[args.path is None]}")

    # ---- methods ----
    rows = {}
    for method in methods:
        started = time.perf_counter()
        found = ALL_METHODS[method](inputs)
        if not found:
            report(f"note: {method}: no value for the prefixes {list(dims)}")
        rows |= found
        seconds[method] = round(time.perf_counter() - started, 3)

    # ---- results ----
    report(format_table(rows, dims))
    for name, row in rows.items():
        if "gradient" in row:
            said = "converged" if row["converged"] else "not converged"
            report(f"{name}: gradient {row['gradient']:.1e} of that at zero weights, {said}")
    report("seconds  " + "  ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    results = {
        "methods": rows,
        "dims": list(dims),
        **facts,
        "protocol": args.protocol,
        "seed": args.seed,
        "draws": args.draws,
        "ways": args.ways,
        "seconds": seconds,
        "environment": environment(),
    }
    write_atomically(args.output, (json.dumps(results, indent=1) + "\n").encode())
    report(f"results  {args.output}")
    return 0


# ---------------------------------------------------------------- the two kinds of input


def of_model(args: SimpleNamespace, requested: Sequence[str]) -> Subject:
    """A checkpoint with two sets of images."""
    train, val = open_dataset(args.train_data), open_dataset(args.val_data)
    check_datasets(train, val)
    model = widest(load_any(args.path, **load_flags(args)))
    dims = prefixes_to_evaluate(args, model)
    # --only makes a method that does not apply an error; otherwise it is skipped with a note.
    methods = [m for m in requested if applies(m, model, (train, val), args.only is not None)]
    device = distributed.pick_device(args.device, 0)
    devices.choose_kernels(device)
    precision = devices.pick_precision(args.precision, device)
    model = model.to(device).to(memory_format=torch.channels_last)

    seconds = {}
    splits = {}
    for name, dataset in (("train", train), ("val", val)):
        started = time.perf_counter()
        splits[name] = extract_split(
            model, dataset, args, precision, device
        )  # once for all methods
        seconds[f"features_{name}"] = round(time.perf_counter() - started, 3)

    @cache
    def pixels() -> tuple[Split, Split]:  # once for all methods that compare pixels
        ratio = model.preprocessing.ratio
        return pixels_of(train, ratio, args), pixels_of(val, ratio, args)

    inputs = BaselineInputs(
        model_name=model.spec.head_name.upper(),
        heads=classifiers(model),
        model_dims=model.dims,
        dims=dims,
        train=splits["train"],
        val=splits["val"],
        device=device,
        pixels=pixels,
        **settings(args, device),
    )
    facts = {
        "checkpoint": args.path,
        "arch": model.spec.arch,
        "head": model.spec.head_name,
        "train": str(train.path),
        "val": str(val.path),
        "n_train": len(train),
        "n_val": len(val),
        "classes": train.num_classes,
        "precision": precision,
    }
    return Subject(inputs, methods, facts, list(model.notes), seconds)


def of_embeddings(args: SimpleNamespace, requested: Sequence[str]) -> Subject:
    """Two folders of embeddings of one encoder."""
    methods = [m for m in requested if m not in (*NEED_CLASSES, *NEED_PIXELS)]
    if args.only and len(methods) < len(requested):
        missing = ", ".join(m for m in requested if m not in methods)
        raise config.ConfigError(f"--only {missing}: needs a model with images; give --path")
    train, val = open_embeddings(args.train_data), open_embeddings(args.val_data)
    about, other = train.meta["model"], val.meta["model"]
    if about["weights_sha256"] != other["weights_sha256"]:
        raise config.ConfigError(
            f"--val-data {val.path}: its embeddings are of another model than those of {train.path}"
        )
    width = train.X.shape[1]
    dims = args.dims or default_dims(width, min(8, width))
    if dims[-1] > width:
        shown = ",".join(map(str, dims))
        raise config.ConfigError(f"--dims {shown}: larger than the width {width} of {train.path}")
    device = distributed.pick_device(args.device, 0)
    devices.choose_kernels(device)

    notes = []
    splits = []
    for embeddings, labels in (
        (train, np.array(train.y)),
        (val, np.array(labels_like(val, train))),
    ):
        features = torch.from_numpy(np.array(embeddings.X, np.float32))
        if not bool(torch.isfinite(features).all()):
            raise config.ConfigError(
                f"{embeddings.path}: has embeddings that are not finite; embed again with "
                "--precision fp32"
            )
        known = torch.from_numpy(labels >= 0)
        if not bool(known.any()):
            raise config.ConfigError(f"{embeddings.path}: has no labels; embed images with classes")
        if not bool(known.all()):
            left_out = int((~known).sum())
            notes.append(f"{embeddings.path}: {left_out:,} images without a label are left out")
        splits.append(Split(features[known].to(device), torch.from_numpy(labels)[known]))
    if len(splits[0].labels.unique()) < 2:
        raise config.ConfigError(
            f"--train-data {train.path}: has only one class; expected two or more"
        )
    inputs = BaselineInputs(
        model_name=str(about["head"]).upper(),
        heads=[],
        model_dims=(),
        dims=tuple(dims),
        train=splits[0],
        val=splits[1],
        device=device,
        **settings(args, device),
    )
    facts = {
        "checkpoint": about["file"],
        "arch": about["arch"],
        "head": about["head"],
        "train": str(train.path),
        "val": str(val.path),
        "n_train": len(splits[0].labels),
        "n_val": len(splits[1].labels),
        "classes": train.meta["data"]["num_classes"],
        "precision": train.meta["precision"],
    }
    return Subject(inputs, methods, facts, notes, {})


def settings(args: SimpleNamespace, device: torch.device) -> dict[str, Any]:
    """The fields of BaselineInputs that the options give."""
    return {
        "shots": args.shots,
        "ways": args.ways,
        "draws": args.draws,
        "seed": args.seed,
        "weight_decay": args.weight_decay,
        "dtype": torch.float32 if device.type == "mps" else torch.float64,  # MPS lacks float64
    }


# ---------------------------------------------------------------- checks


def check(args: SimpleNamespace) -> None:
    """ConfigError for more than one process, and for a place that is not writable."""
    if count_in("WORLD_SIZE", 1) > 1:
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


def pixels_of(dataset, ratio: float, args: SimpleNamespace) -> Split:
    """The pixels of small copies as features [N, side x side x 3], 0 to 1, cropped as usual."""
    loader = Loader(
        dataset,
        args.batch_size,
        order="sequential",
        crop=CenterCrop(PIXEL_SIDE, ratio),
        num_workers=args.workers,
    )
    pixels = torch.empty(len(dataset), PIXEL_SIDE * PIXEL_SIDE * 3)
    labels = torch.empty(len(dataset), dtype=torch.int64)
    for batch in loader:
        pixels[batch.index] = batch.images.flatten(1).float() / 255
        labels[batch.index] = batch.labels
    return Split(pixels, labels)


def classifiers(model: NestedModel) -> list:
    """(weight [C, d], bias [C]) of each head."""
    return [
        (head.get_parameter("weight").detach(), head.get_parameter("bias").detach())
        for head in model.head.heads
    ]


# ---------------------------------------------------------------- output


def format_table(rows: Mapping[str, Mapping[str, Any]], dims: Sequence[int]) -> str:
    """Methods x prefixes: top-1 % with the standard deviation over draws; - for a missing value."""
    columns = {str(d) for d in dims}
    for entry in rows.values():
        columns |= entry["values"].keys()  # pixels have their own width
    shown = sorted(columns, key=int)
    lines = [["top-1 %", *shown]]
    for name, entry in rows.items():
        cells = []
        for d in shown:
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
