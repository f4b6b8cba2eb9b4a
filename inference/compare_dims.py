"""Every dim of a model, or of several exports: accuracy, cost, confusion matrices, maps.

    matryoshka dims --path runs/vit_lr0.0001_cifar10/RUN
    matryoshka dims --path checkpoint/nested_models --dataset cifar10
    matryoshka dims --path a.safetensors b.pth --data-root photos --output compared

Prints a table and writes it as dims.json and dims.csv, with a confusion matrix of each dim (PNG and
CSV), maps of the embeddings and the accuracy against dim and multiply-adds (PNG). `matryoshka
report` shows dims.json of a run.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matryoshka import config
from matryoshka.evaluation.dims_options import dims_parser as parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import numpy as np
import torch
from tqdm import tqdm

from matryoshka import devices, distributed
from matryoshka.checkpoint.run_files import run_of
from matryoshka.data import BetonFile, CenterCrop, ImageFolder, Loader
from matryoshka.data.subset import Subset
from matryoshka.environment import environment
from matryoshka.evaluation.dim_answers import (
    DimAnswers,
    answer,
    by_dim,
    confusion,
    most_confused,
    sample_of,
)
from matryoshka.evaluation.dim_costs import BLOCKS, dim_costs
from matryoshka.evaluation.dim_models import DimModel, load_dim_models
from matryoshka.evaluation.embedding_map import embedding_map
from matryoshka.evaluation.evaluation_set import OWN, is_own, is_public, open_evaluation_images
from matryoshka.evaluation.run_images import check_same_images, run_with_images
from matryoshka.files import check_writable, write_atomically
from matryoshka.report import short_dims
from matryoshka.report.claims import paired
from matryoshka.report.dim_plots import plot_confusion, plot_dims, plot_map
from matryoshka.report.dims import costs_differ, dims_csv, dims_table, error_lines

Data = BetonFile | ImageFolder | Subset
MAX_CLASSES = 100  # of confusion matrices: 100 x 100 numbers for each dim
MAX_ERRORS = 15  # most frequent errors that are kept
FOLDER = "dims"


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    models = load_dim_models(args.path, args.resolution)
    name, dataset = images_of(args, models)
    for each in models:
        each.model.check_classes(dataset)
    folder = output_folder(args, models)

    with distributed.joined(args.device) as world:
        if world.size > 1:
            raise config.ConfigError(
                "matryoshka dims runs in one process: start it without torchrun"
            )
        for each in models:
            each.model.to(world.device).to(memory_format=torch.channels_last)
        found = about(args, models, dataset, name)
        named = "".join(f"{word}, " for word in (name, args.split) if word not in (OWN, None))
        print(f"{found['checkpoint']}: {found['arch']}, dims {' '.join(map(str, found['dims']))}")
        print(
            f"{found['data']}: {named}{found['images']:,} images at {found['resolution']} px",
            flush=True,
        )
        answers = all_answers(args, models, dataset, world)
        found |= accuracies(found, answers)
        found |= costs(args, models, world)
        found |= confusions(found, answers)
        print(dims_table(found), flush=True)
        found["map"] = maps(args, found["dims"], answers)
    for line in write_all(folder, found):
        print(line)
    if args.tensorboard:
        write_board(Path(args.tensorboard), found)
        print(f"written  {args.tensorboard}: TensorBoard")
    return 0


# ---------------------------------------------------------------- options


def images_of(args: SimpleNamespace, models: Sequence[DimModel]) -> tuple[str, Data]:
    """(name of the data set, images): of the options, else of the models' run."""
    path = models[0].path
    if args.dataset is not None or args.data_root is not None:
        if args.dataset is not None and not (is_public(args.dataset) or is_own(args.dataset)):
            raise config.ConfigError(
                f"--dataset {args.dataset}: expected cifar10, cifar100, stl10, tiny-imagenet, "
                "hf:OWNER/NAME, or a path of your own"
            )
    elif run_with_images(path) is None:
        raise config.ConfigError(f"give the images of {path}: --dataset cifar10, or --data-root")
    else:
        for other in models[1:]:
            check_same_images(path, other.path, args.split)
    return open_evaluation_images(args, path)


def output_folder(args: SimpleNamespace, models: Sequence[DimModel]) -> Path:
    """--output, dims/ in the run folder that --path names, or dims/ here; writable."""
    named = Path(args.path[0])
    is_run = len(args.path) == 1 and named.is_dir() and run_of(models[0].path) == named.resolve()
    default = named / FOLDER if is_run else Path(FOLDER)
    folder = default if args.output is None else Path(args.output)
    try:
        check_writable(folder)
    except OSError as error:
        raise config.ConfigError(f"--output {folder}: {error.strerror}") from None
    return folder


# ---------------------------------------------------------------- results


def about(
    args: SimpleNamespace, models: Sequence[DimModel], dataset: Any, name: str
) -> dict[str, Any]:
    """What was evaluated, with the keys of `matryoshka eval`'s results."""
    first = models[0].model
    dims = [dim for each in models for dim in each.model.dims]
    single = len(models) == 1
    classes = first.spec.num_classes
    names = dataset.classes or first.classes or [str(k) for k in range(classes)]
    return {
        "checkpoint": models[0].path if single else str(Path(models[0].path).parent),
        "arch": first.spec.arch,
        "head": first.spec.head_name if single else "mrl",
        "dims": dims,
        "dataset": name,
        "data": str(dataset.path),
        "split": args.split,
        "one_pass": single and first.one_pass,
        "classes": classes,
        "class_names": list(names),
        "images": len(dataset),
        "preprocessing": "checkpoint",
        "resolution": first.preprocessing.size,
        "crop_ratio": first.preprocessing.ratio,
        "tta": False,
        "environment": environment(),
    }


def all_answers(
    args: SimpleNamespace,
    models: Sequence[DimModel],
    dataset: Any,
    world: distributed.World,
) -> DimAnswers:
    rows = sample_of(len(dataset), args.max_samples if args.map != "none" else 0, args.seed)
    answers = DimAnswers(np.asarray(dataset.labels), rows)
    precision = devices.pick_precision(args.precision, world.device)
    for each in models:
        preprocessing = each.model.preprocessing
        loader = Loader(
            dataset,
            args.batch_size,
            order="sequential",
            crop=CenterCrop(preprocessing.size, preprocessing.ratio),
            num_workers=args.workers,
            device=world.device,
        )
        bar = tqdm(loader, leave=False, unit="batch", disable=None)
        answer(each.model, bar, answers, precision=precision)
    return answers


def accuracies(found: dict[str, Any], answers: DimAnswers) -> dict[str, Any]:
    dims = found["dims"]
    right = {dim: answers.predictions[dim] == answers.labels for dim in dims}
    return {
        "prefixes": by_dim(answers.accuracy, dims),
        "loss": by_dim(answers.loss, dims),
        "paired": {str(dim): paired(right[dim], right[dims[-1]])._asdict() for dim in dims[:-1]},
    }


def costs(
    args: SimpleNamespace, models: Sequence[DimModel], world: distributed.World
) -> dict[str, Any]:
    measured = dim_costs(models, () if args.no_latency else sorted(set(args.batches)))
    files = {dim: each.path for each in models for dim in each.model.dims}
    rows = {}
    for dim, cost in measured.items():
        seconds = {str(batch): value for batch, value in cost.seconds.items()}
        rows[str(dim)] = {
            "file": files[dim],
            "parameters": cost.parameters,
            "bytes": cost.bytes,
            "seconds": seconds,
        }
    return {
        "macs": {str(dim): cost.macs for dim, cost in measured.items()},
        "costs": rows,
        "device": world.device.type,
        "threads": torch.get_num_threads(),
        "blocks": BLOCKS,
    }


def confusions(found: dict[str, Any], answers: DimAnswers) -> dict[str, Any]:
    classes = found["classes"]
    matrices = {}
    errors = {}
    for dim in found["dims"]:
        matrix = confusion(answers.labels, answers.predictions[dim], classes)
        errors[str(dim)] = most_confused(matrix, MAX_ERRORS)
        if classes <= MAX_CLASSES:
            matrices[str(dim)] = matrix.tolist()
    return {"confusion": matrices, "confused": errors}


def maps(args: SimpleNamespace, dims: Sequence[int], answers: DimAnswers) -> dict[str, Any] | None:
    """Two-dimensional maps of a sample of the embeddings; None without them."""
    if args.map == "none" or args.max_samples == 0:
        return None
    points = {}
    for dim in tqdm(dims, leave=False, unit="map", disable=None):
        features = answers.features[dim]
        placed = embedding_map(
            features,
            method=args.map,
            seed=args.seed,
            max_rows=len(features),
            perplexity=args.perplexity,
        )
        # Rows with NaN or infinity have no place; they are drawn at the origin.
        points[str(dim)] = np.nan_to_num(placed).round(3).tolist()
    return {
        "method": args.map,
        "labels": answers.labels[answers.rows].tolist(),
        "points": points,
    }


# ---------------------------------------------------------------- files


def write_all(folder: Path, found: dict[str, Any]) -> list[str]:
    """Write the results and plots; lines that name them."""
    names = found["class_names"]
    title = f"{found['arch']} {short_dims(found['dims'])}".strip()
    files = {"dims.csv": dims_csv(found).encode()}
    if len(found["dims"]) > 1:
        files["accuracy.png"] = plot_dims(found, title)
    if costs_differ(found):
        files["cost.png"] = plot_dims(found, title, against="macs")
    for dim, matrix in found["confusion"].items():
        heading = f"dim {dim}, top-1 {found['prefixes'][dim]['top1']:.1f} %"
        files[f"confusion_dim{dim}.png"] = plot_confusion(matrix, names, heading)
        files[f"confusion_dim{dim}.csv"] = matrix_csv(matrix, names).encode()
    if found["map"]:
        method = {"tsne": "t-SNE", "pca": "PCA"}[found["map"]["method"]]
        for dim, points in found["map"]["points"].items():
            picture = plot_map(points, found["map"]["labels"], names, f"dim {dim}, {method}")
            files[f"{found['map']['method']}_dim{dim}.png"] = picture
    files["dims.json"] = (json.dumps(found) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)

    widest = str(found["dims"][-1])
    errors = error_lines(found["confused"][widest][:3], names)
    lines = [f"errors   dim {widest}, the most frequent: {'; '.join(errors)}"] if errors else []
    return [*lines, f"written  {folder}: dims.json, dims.csv and {len(files) - 2} plots and tables"]


def write_board(folder: Path, found: dict[str, Any]) -> None:
    """Loss, accuracy and accuracy of each class as scalars, under the tags of
    matryoshka-vit-compression; the step is the dim.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as board:
        for dim in found["dims"]:
            row = found["prefixes"][str(dim)]
            board.add_scalar("Evaluation/Loss", found["loss"][str(dim)], dim)
            board.add_scalar("Evaluation/Accuracy", row["top1"], dim)
            for label, images in enumerate(found["confusion"].get(str(dim), [])):
                share = 100 * images[label] / max(sum(images), 1)
                board.add_scalar(f"PerClass/Class_{label}", share, dim)


def matrix_csv(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A confusion matrix with its class names; rows are true classes."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["true \\ predicted", *names])
    for name, row in zip(names, matrix, strict=True):
        writer.writerow([name, *row])
    return table.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
