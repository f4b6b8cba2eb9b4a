"""The baselines that the MRL paper compares with, for one checkpoint: from its features alone,
without training.

    python baselines.py --path runs/ff/model.safetensors --train-data train.beton --val-data
        val.beton
    python baselines.py --path torchvision:resnet50 --train-data /data/imagenet/train --val-data
        /data/imagenet/val \\ --only 1nn,ncm,svd,rand-fs

linear    the checkpoint's own classifiers, at the prefixes that it was trained for
1nn       class of the nearest training image; prefixes L2-normalised
ncm       nearest class mean of --shots training images of each class, drawn --draws times
svd       the classifier W [C, D] of one head cut to rank K by its singular values; the bias stays
svd-1nn   1nn on the features' projections on the first K right singular vectors of W, at most min(C, D)
rand-fs   1nn on K features drawn at random, --draws times; the whole feature has nothing to draw
rand-lp   a linear probe on such features: matryoshka/probe.py, with --weight-decay

linear, svd and svd-1nn need the classes that the model was trained on, the last two a model with
one head; without --only, what does not apply is left out. Figures are top-1 %, means over the draws
with the standard deviation. The paper's row FF is one model for each width; here prefixes of a
single-head model say FF<width>, and are one model's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka import config, distributed
from matryoshka.checkpoint.published import load_any
from matryoshka.data import CenterCrop, Loader, open_dataset
from matryoshka.environment import environment
from matryoshka.evaluation.neighbours import knn_accuracy, nearest, nearest_class_mean
from matryoshka.evaluation.options import METHODS
from matryoshka.evaluation.options import baselines_parser as parser
from matryoshka.evaluation.predict import extract_features
from matryoshka.evaluation.probe import fit
from matryoshka.files import write_atomically
from matryoshka.models import ModelError, NestedModel
from matryoshka.nested import default_dims, nested_logits

NEED_CLASSES, NEED_ONE_HEAD = ("linear", "svd", "svd-1nn"), ("svd", "svd-1nn")


@dataclass
class Split:
    """A data set as features [N, D] and labels [N]."""

    features: Tensor
    labels: Tensor


@dataclass
class Task:
    """All that the methods work on. name: MRL, MRL-E or FF<width>; dims: the columns of the table."""

    args: argparse.Namespace
    model: NestedModel
    name: str
    dims: tuple[int, ...]
    train: Split
    val: Split
    device: torch.device
    dtype: torch.dtype

    @property
    def width(self) -> int:
        return self.train.features.shape[1]

    @property
    def place(self) -> dict:
        return {"device": self.device, "dtype": self.dtype}


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check(args)
    wanted = args.only or METHODS
    train, val = open_dataset(args.train_data), open_dataset(args.val_data)
    check_sets(train, val)
    model = load_any(
        args.path,
        mrl=args.mrl and not args.efficient,
        efficient=args.efficient,
        rep_size=args.rep_size,
        old_ckpt=args.old_ckpt,
    )
    dims = columns(args, model)
    methods = [
        m for m in METHODS if m in wanted and applies(m, model, train, val, args.only is not None)
    ]
    device = distributed.pick_device(args.device, 0)
    precision = distributed.pick_precision(args.precision, device)
    model = model.to(device).to(memory_format=torch.channels_last)

    seconds, splits = {}, {}
    for name, dataset in (("train", train), ("val", val)):
        started = time.perf_counter()
        splits[name] = extract(model, dataset, args, precision, device)
        seconds[f"features_{name}"] = round(time.perf_counter() - started, 3)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    task = Task(
        args,
        model,
        model.spec.head_name.upper(),
        dims,
        splits["train"],
        splits["val"],
        device,
        dtype,
    )
    say = partial(print, flush=True)
    for note in model.notes:
        say(f"note: {note}")
    say(f"{args.path}: {model.spec.arch}, {model.spec.head_name}")
    say(
        f"train {train.path}: {len(train):,} images; val {val.path}: {len(val):,}, "
        f"{train.num_classes} classes"
    )
    if left_out := [m for m in wanted if m not in methods]:
        say(
            f"note: {', '.join(left_out)} left out: these need the model's own classes, svd one "
            "head, too"
        )
    rows = {}
    for method in methods:
        started = time.perf_counter()
        if not (found := COMPUTE[method](task)):
            say(f"note: {method}: no figure for the prefixes {list(dims)}")
        rows |= found
        seconds[method] = round(time.perf_counter() - started, 3)
    say(table(rows, dims))
    say("seconds  " + "  ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
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
    say(f"results  {args.output}")
    return 0


# ---------------------------------------------------------------- what can be wrong


def check(args: argparse.Namespace) -> None:
    """ConfigError for more than one process, and for a place that is not writable."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise config.ConfigError("baselines.py runs as one process; start it without torchrun")
    if Path(args.output).is_dir():
        raise config.ConfigError(f"--output {args.output}: is a folder; give the name of a file")
    if not Path(args.output).resolve().parent.is_dir():
        raise config.ConfigError(
            f"--output {args.output}: its folder does not exist; make it first"
        )


def check_sets(train, val) -> None:
    """Both sets have images, two classes or more, and mean the same by a label."""
    for option, dataset in (("--train-data", train), ("--val-data", val)):
        if not len(dataset):
            raise config.ConfigError(f"{option} {dataset.path}: has no images")
        if dataset.labels.min() < 0:
            raise config.ConfigError(
                f"{option} {dataset.path}: has negative labels; write it again with sound ones"
            )
    if train.classes and val.classes and train.classes != val.classes:
        raise config.ConfigError(
            f"--val-data {val.path}: its {val.num_classes} classes are not the "
            f"{train.num_classes} of {train.path}; "
            "give two sets with the same class folders"
        )
    if val.num_classes > train.num_classes:
        raise config.ConfigError(
            f"--val-data {val.path}: has {val.num_classes} classes, {train.path} only "
            f"{train.num_classes}"
        )
    if len(set(train.labels.tolist())) < 2:
        raise config.ConfigError(
            f"--train-data {train.path}: has only one class, nothing to tell apart"
        )


def columns(args: argparse.Namespace, model: NestedModel) -> tuple[int, ...]:
    """The prefixes to look at: --dims, or the model's, or powers of two up to a fixed feature's
    width.
    """
    width = model.dims[-1]
    if args.dims is None:
        return model.dims if len(model.dims) > 1 else default_dims(width, min(8, width))
    dims = args.dims
    if dims[-1] > width:
        shown = ",".join(map(str, dims))
        raise config.ConfigError(
            f"--dims {shown}: go beyond the feature width {width} of {args.path}"
        )
    return dims


def applies(method: str, model: NestedModel, train, val, asked: bool) -> bool:
    """Whether a method makes sense for model and data. asked: that it does not is an error."""
    try:
        if method in NEED_ONE_HEAD and len(model.dims) > 1:
            raise ModelError(
                f"--only {method}: needs a model with one classifier, this is "
                f"{model.spec.head_name}"
            )
        if method in NEED_CLASSES:
            for dataset in (train, val):
                model.check_classes(dataset)
    except ModelError:
        if asked:
            raise
        return False
    return True


# ---------------------------------------------------------------- the methods


def extract(model: NestedModel, dataset, args, precision: str, device: torch.device) -> Split:
    """The features that the classifiers see, on the device where half of its memory holds them."""
    crop = CenterCrop(model.preprocessing.size, model.preprocessing.ratio)
    loader = Loader(
        dataset,
        args.batch_size,
        order="sequential",
        image=crop,
        num_workers=args.workers,
        device=device,
    )
    bar = tqdm(
        loader, desc=dataset.path.name, leave=False, unit="batch", disable=not sys.stderr.isatty()
    )
    features, labels = extract_features(model, bar, len(dataset), precision)
    if not bool(torch.isfinite(features.sum(0)).all()):
        raise ModelError(
            f"--path {args.path}: its features of {dataset.path} are not finite; use --precision "
            "fp32"
        )
    features = features[:, : model.dims[-1]]  # a fixed feature may be narrower than its trunk
    if device.type == "cuda" and features.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        features = features.to(device)
    return Split(features, labels)


def row(
    metric: str,
    dims: Sequence[int],
    values: Sequence[float],
    std: Sequence[float | None] | None = None,
    **more,
) -> dict:
    """One method's entry of the JSON file."""
    spread = None if std is None else dict(zip(map(str, dims), std, strict=True))
    return {
        "metric": metric,
        "values": dict(zip(map(str, dims), values, strict=True)),
        "std": spread,
        **more,
    }


def spread(values: Tensor) -> dict:
    """Mean and sample standard deviation over draws, [draws, G]; without a second draw there is
    none.
    """
    std = values.std(0).tolist() if len(values) > 1 else None
    return {"values": values.mean(0).tolist(), "std": std, "draws": len(values)}


def linear_accuracy(task: Task, heads, dims: Sequence[int]) -> list[float]:
    """Top-1 % of classifiers on the prefixes of the validation features."""
    hits = torch.zeros(len(dims), dtype=torch.int64)
    for x, y in zip(task.val.features.split(1024), task.val.labels.split(1024), strict=True):
        logits = nested_logits(
            x.to(heads[0][0].device, heads[0][0].dtype), heads, dims, fused=False
        )
        hits += (logits.argmax(2).cpu() == y).sum(1)
    return (100 * hits.double() / len(task.val.labels)).tolist()


def neighbour_accuracy(
    task: Task, database: Tensor, queries: Tensor, dims: Sequence[int]
) -> list[float]:
    return knn_accuracy(
        nearest(database, queries, dims, **task.place), task.train.labels, task.val.labels
    )


def own_heads(task: Task) -> list[tuple[Tensor, Tensor]]:
    return [
        (h.get_parameter("weight").detach(), h.get_parameter("bias").detach())
        for h in task.model.head.heads
    ]


def linear(task: Task) -> dict:
    values = dict(
        zip(task.model.dims, linear_accuracy(task, own_heads(task), task.model.dims), strict=True)
    )
    kept = [d for d in task.dims if d in values]
    return (
        {f"{task.name} linear": row("top1 linear", kept, [values[d] for d in kept])} if kept else {}
    )


def one_nn(task: Task) -> dict:
    values = neighbour_accuracy(task, task.train.features, task.val.features, task.dims)
    return {f"{task.name} 1-NN": row("top1 1-nn", task.dims, values)}


def class_means(task: Task) -> dict:
    a = task.args
    accuracy = nearest_class_mean(
        task.train.features,
        task.train.labels,
        task.val.features,
        task.val.labels,
        task.dims,
        a.shots,
        draws=a.draws,
        seed=a.seed,
        ways=a.ways,
        **task.place,
    )
    ways = f"{a.ways}-way " if a.ways else ""
    return {
        f"{task.name} NCM {ways}{n}-shot": row(
            "top1 ncm", task.dims, **spread(accuracy[:, s]), shots=n, ways=a.ways, seed=a.seed
        )
        for s, n in enumerate(a.shots)
    }


def svd(task: Task) -> dict:
    weight, bias = own_heads(task)[0]
    u, s, v = torch.linalg.svd(weight.cpu().double(), full_matrices=False)
    values = []
    for k in task.dims:  # from the rank of W on it is W itself
        cut = (u[:, :k] * s[:k] @ v[:k]).to(weight)
        values += linear_accuracy(task, [(cut, bias)], [weight.shape[1]])
    return {"SVD linear": row("top1 linear", task.dims, values, rank=len(s))}


def svd_neighbours(task: Task) -> dict:
    weight, _ = own_heads(task)[0]
    axes = torch.linalg.svd(weight.cpu().double(), full_matrices=False)[2]
    dims = [k for k in task.dims if k <= len(axes)]
    if not dims:
        return {}
    axes = axes.to(task.device, task.dtype)
    database, queries = (
        torch.cat([(x.to(axes) @ axes[: dims[-1]].T).to(x) for x in split.features.split(8192)])
        for split in (task.train, task.val)
    )
    return {
        "SVD 1-NN": row(
            "top1 1-nn", dims, neighbour_accuracy(task, database, queries, dims), rank=len(axes)
        )
    }


def over_draws(task: Task, compute: Callable[[Tensor, Sequence[int]], list[float]]) -> dict:
    """compute(column numbers, dims) for --draws random orders of the features; their prefixes are
    the random subsets.

    The whole feature has one subset only: it is computed once, and has no spread.
    """
    drawn = [d for d in task.dims if d < task.width]
    a, values, std = task.args, [], []
    if drawn:
        order = [
            torch.Generator().manual_seed((a.seed * 1_000_003 + draw) % 2**63)
            for draw in range(a.draws)
        ]
        columns = [torch.randperm(task.width, generator=g)[: drawn[-1]] for g in order]
        found = spread(torch.tensor([compute(one, drawn) for one in columns], dtype=torch.float64))
        values, std = found["values"], found["std"]
    if len(drawn) < len(task.dims):
        values = values + compute(torch.arange(task.width), [task.width])
        std = None if std is None else [*std, None]
    return {
        "dims": task.dims,
        "values": values,
        "std": std or None,
        "draws": a.draws,
        "seed": a.seed,
    }


def random_features(task: Task) -> dict:
    def compute(columns: Tensor, dims: Sequence[int]) -> list[float]:
        database, queries = (
            split.features[:, columns.to(split.features.device)] for split in (task.train, task.val)
        )
        return neighbour_accuracy(task, database, queries, dims)

    return {"Rand. FS 1-NN": row("top1 1-nn", **over_draws(task, compute))}


def random_probe(task: Task) -> dict:
    converged = []

    def compute(columns: Tensor, dims: Sequence[int]) -> list[float]:
        columns = columns.to(task.train.features.device)
        probe = fit(
            task.train.features[:, columns],
            task.train.labels,
            dims,
            int(task.train.labels.max()) + 1,
            task.args.weight_decay,
            **task.place,
        )
        converged.extend(probe.converged)
        chosen = Split(task.val.features[:, columns.to(task.val.features.device)], task.val.labels)
        return linear_accuracy(Task(**{**vars(task), "val": chosen}), probe.heads, dims)

    found = over_draws(task, compute)
    more = {"weight_decay": task.args.weight_decay, "converged": all(converged)}
    return {"Rand. LP linear": row("top1 linear", **found, **more)}


COMPUTE: dict[str, Callable[[Task], dict]] = dict(
    zip(
        METHODS,
        (linear, one_nn, class_means, svd, svd_neighbours, random_features, random_probe),
        strict=True,
    )
)


def table(rows: dict[str, dict], dims: Sequence[int]) -> str:
    """Methods x prefixes, top-1 %, with the standard deviation where there is one; - where there is
    no figure.
    """
    lines = [["top-1 %", *map(str, dims)]]
    for name, entry in rows.items():
        cells = []
        for d in map(str, dims):
            cell = f"{entry['values'][d]:.2f}" if d in entry["values"] else "-"
            deviation = (entry["std"] or {}).get(d)
            cells.append(cell if deviation is None else f"{cell} ±{deviation:.2f}")
        lines.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    )


if __name__ == "__main__":
    raise SystemExit(main())
