"""Nested linear classifiers on the frozen features of any model: the linear probe.

    python linear_probe.py --model.path=runs/ff/model.safetensors \\
        --data.train_dataset=train.beton --data.val_dataset=val.beton
    python linear_probe.py --model.path=torchvision:resnet50 --model.efficient=1 \\
        --probe.solver=sgd ...

Features are computed once (central crop, no augmentation); evaluation/probe.py documents the
objective. With several values of probe.weight_decay, each is fitted to nine tenths of the training
set; the best one on the other tenth, per prefix (MRL-E: for all prefixes together), is fitted to
the whole set. <logging.folder>/<run id>/ receives results.json and model.safetensors (trunk and
nested head; `matryoshka eval --path` reads it). Runs as one process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matryoshka import config
from matryoshka.evaluation.probe_options import parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka import checkpoint, devices, distributed, json_files
from matryoshka.checkpoint.published import load_any
from matryoshka.checkpoint.run_files import FINAL
from matryoshka.data import CenterCrop, Loader, open_dataset
from matryoshka.distributed import World
from matryoshka.environment import count_in, environment
from matryoshka.evaluation.predict import extract_features
from matryoshka.evaluation.probe import Probe, ProbeError, choose_weight_decay, fit
from matryoshka.files import write_atomically
from matryoshka.models import NestedModel, shortest_prefix, widest
from matryoshka.nested import NestedLinear, check_dims, default_dims
from matryoshka.training.loaders import check_classes
from matryoshka.training.run_folder import new_run_id
from matryoshka.training.run_lock import OTHER_FOLDER, RunLock, is_unused


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    cfg = parser().parse_args(argv)
    if count_in("WORLD_SIZE", 1) > 1:
        raise config.ConfigError("linear_probe.py runs as one process; start it without torchrun")
    world = World(distributed.pick_device(cfg.model.device, 0))
    devices.choose_kernels(world.device)
    run = Path(cfg.logging.folder) / (cfg.logging.run_id or new_run_id("probe"))
    check_new(run)
    sets = {
        "train": open_dataset(cfg.data.train_dataset),
        "val": open_dataset(cfg.data.val_dataset),
    }
    check_sets(**sets)
    model = widest(load_any(cfg.model.path, "model.path"))
    dims = prefixes(cfg, model)
    # Before hours of work: a folder that cannot be created, or is in use, ends the program now.
    with RunLock(run, remedy=OTHER_FOLDER):
        check_new(run)
        probe_and_save(cfg, model, dims, sets=sets, run=run, device=world.device)
    return 0


def check_new(run: Path) -> None:
    """Raise ConfigError for a folder that has something in it, but what a killed probe leaves."""
    if not is_unused(run) and not is_unfinished(run):
        raise config.ConfigError(
            f"{run}: exists; choose another --logging.run_id or --logging.folder"
        )


def is_unfinished(run: Path) -> bool:
    """Whether a folder has nothing but the files that a probe writes before its model."""
    names = {path.name for path in run.iterdir() if path.suffix not in (".lock", ".tmp")}
    return names <= {"params.json", "config.yaml", "results.json"}


def check_sets(train, val) -> None:
    """Raise ConfigError or ProbeError for datasets that a classifier cannot be fitted to."""
    for option, dataset in (("data.train_dataset", train), ("data.val_dataset", val)):
        if not len(dataset):
            raise config.ConfigError(f"{option}={dataset.path}: contains no images")
        if dataset.labels.min() < 0:
            raise config.ConfigError(
                f"{option}={dataset.path}: contains negative labels; write it again with labels "
                "from 0"
            )
    check_classes(train, val)
    if train.num_classes < 2:
        raise ProbeError(
            f"data.train_dataset={train.path}: contains only one class, a probe needs two or more"
        )


def prefixes(cfg: SimpleNamespace, model: NestedModel) -> tuple[int, ...]:
    """Prefix lengths to fit: model.dims, or powers of two up to the model's width."""
    if cfg.model.dims is None:
        return default_dims(model.width, shortest_prefix(cfg.model.nesting_start, model.width))
    try:
        return check_dims(cfg.model.dims, model.width)
    except ValueError as error:
        raise config.ConfigError(f"model.dims: {error} ({model.spec.arch})") from None


def probe_and_save(
    cfg: SimpleNamespace,
    model: NestedModel,
    dims: tuple[int, ...],
    *,
    sets: Mapping[str, Any],
    run: Path,
    device: torch.device,
) -> None:
    """Extract features, fit the classifiers, evaluate them and write the run folder."""
    print_now = partial(print, flush=True)
    train, val = sets["train"], sets["val"]
    num_classes = train.num_classes
    print_now(
        f"model    {cfg.model.path}: {model.spec.arch}, {model.width} features; dims {list(dims)}"
    )
    print_now(f"data     {len(train):,} images, {num_classes} classes; {len(val):,} for validation")

    # ---- features ----
    model = model.to(device).to(memory_format=torch.channels_last)
    precision = devices.pick_precision(cfg.model.precision, device)
    features = {}
    labels = {}
    seconds = {}
    for split, dataset in sets.items():
        began = time.perf_counter()
        features[split], labels[split] = extract(
            model, dataset, cfg, precision=precision, device=device
        )
        seconds[f"features_{split}"] = time.perf_counter() - began
    total = sum(seconds.values())
    rate = (len(train) + len(val)) / total
    print_now(f"features {total:.1f} s, {rate:.0f} images/s, {device.type}, {precision}")
    missing = num_classes - len(torch.unique(labels["train"]))
    if missing:
        print_now(f"note     {missing} of {num_classes} classes have no training image")

    # ---- classifiers ----
    began = time.perf_counter()
    probe, held_out = solve(
        cfg, features["train"], labels["train"], dims, num_classes=num_classes, device=device
    )
    seconds["fit"] = time.perf_counter() - began
    for decay, top1 in held_out.items():
        shown = "  ".join(f"{value:.1f}" for value in top1)
        print_now(f"held out weight decay {decay:g}: top-1 {shown}")
    dtype = str(solver_dtype(cfg, device)).removeprefix("torch.")
    print_now(f"fit      {seconds['fit']:.1f} s, {cfg.probe.solver}, {dtype}")

    # ---- evaluation ----
    head = probe.head()
    accuracy = evaluate(head, features["val"], labels["val"])
    print_now(table(accuracy, probe))
    if not all(probe.converged):
        remedy = "raise probe.max_iter"
        if cfg.probe.solver == "sgd":
            remedy = "raise probe.epochs, or use probe.solver=lbfgs"
        print_now(f"note     not converged to probe.tolerance={cfg.probe.tolerance:g}; {remedy}")

    # ---- files ----
    # The trunk with the new head is a model like any other: `matryoshka eval` opens it.
    model.head = head
    model.classes = train.classes
    model.spec = replace(
        model.spec, num_classes=num_classes, dims=dims, efficient=cfg.model.efficient
    )
    by_prefix = {}
    for g, dim in enumerate(dims):
        by_prefix[str(dim)] = accuracy[dim] | {
            "loss": probe.loss[g],
            "gradient": probe.gradient[g],
            "converged": probe.converged[g],
            "iterations": probe.iterations[g],
            "weight_decay": probe.weight_decay[g],
        }
    held_out_by_decay = {}
    for decay, top1 in held_out.items():
        held_out_by_decay[str(decay)] = dict(zip(map(str, dims), top1, strict=True))
    results = {
        "prefixes": by_prefix,
        "held_out_top1": held_out_by_decay,
        "checkpoint": cfg.model.path,
        "arch": model.spec.arch,
        "head": model.spec.head_name,
        "train": str(train.path),
        "val": str(val.path),
        "n_train": len(train),
        "n_val": len(val),
        "classes": num_classes,
        "resolution": model.preprocessing.size,
        "crop_ratio": model.preprocessing.ratio,
        "precision": precision,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "environment": environment(),
    }
    options = config.flat(cfg)
    write_atomically(run / "params.json", json_files.encode(options))
    write_atomically(run / "config.yaml", config.to_yaml(cfg).encode())
    write_atomically(run / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    # Last: its existence marks a run as finished (list_runs.py).
    checkpoint.save_model(model, run / FINAL, options)
    print_now(f"results  {run / 'results.json'}\nmodel    {run / FINAL}")


def extract(
    model: NestedModel, dataset, cfg: SimpleNamespace, *, precision: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(features [N, D], labels [N]) of a dataset, on the CPU."""
    crop = CenterCrop(model.preprocessing.size, model.preprocessing.ratio)
    loader = Loader(
        dataset,
        cfg.data.batch_size,
        order="sequential",
        crop=crop,
        num_workers=cfg.data.num_workers,
        device=device,
    )
    bar = tqdm(
        loader, desc=dataset.path.name, leave=False, unit="batch", disable=not sys.stderr.isatty()
    )
    return extract_features(model, bar, len(dataset), precision)


def solver_dtype(cfg: SimpleNamespace, device: torch.device) -> torch.dtype:
    """float64, unless float32 is requested or the device is MPS, which lacks float64."""
    if cfg.probe.precision == "fp32":
        return torch.float32
    if cfg.probe.precision == "auto" and device.type == "mps":
        return torch.float32
    return torch.float64


def solve(
    cfg: SimpleNamespace,
    features: Tensor,
    labels: Tensor,
    dims: tuple[int, ...],
    *,
    num_classes: int,
    device: torch.device,
) -> tuple[Probe, dict[float, list[float]]]:
    """Choose the weight decays and fit the classifiers.

    Returns (classifiers, {weight decay: held-out top-1 in percent of every prefix}); the second is
    empty if there is only one weight decay.
    """
    p = cfg.probe
    # Up to half of the free memory: the solver needs the rest. Features that stay on the CPU are
    # copied block by block in every pass.
    if device.type == "cuda" and features.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        features = features.to(device)
    options = {
        "solver": p.solver,
        "shared": cfg.model.efficient,
        "max_iter": p.max_iter,
        "tolerance": p.tolerance,
        "epochs": p.epochs,
        "lr": p.lr,
        "batch_size": p.batch_size,
        "seed": p.seed,
        "device": device,
        "dtype": solver_dtype(cfg, device),
    }
    decays: list[float] = [p.weight_decay[0]] * len(dims)
    held_out = {}
    if len(p.weight_decay) > 1:
        decays, top1 = choose_weight_decay(
            features, labels, dims, num_classes, p.weight_decay, **options
        )
        held_out = dict(zip(p.weight_decay, top1, strict=True))
    return fit(features, labels, dims, num_classes, decays, **options), held_out


@torch.inference_mode()
def evaluate(head: NestedLinear, features: Tensor, labels: Tensor) -> dict[int, dict[str, float]]:
    """{prefix: {top1, top5}} in percent of the head as it is saved."""
    # torchmetrics takes seconds to import: not before it is needed.
    from matryoshka.evaluation.accuracy import PrefixAccuracy

    metric = PrefixAccuracy(head.dims)
    for x, y in zip(features.split(1024), labels.split(1024), strict=True):
        metric.update(head(x), y)
    return metric.compute()


def table(accuracy: dict[int, dict[str, float]], probe: Probe) -> str:
    """One aligned line per prefix: accuracy on the validation set and the state of the fit."""
    lines = ["prefix  top-1 %  top-5 %  train loss  weight decay  gradient  iterations  converged"]
    for g, (dim, row) in enumerate(accuracy.items()):
        converged = "yes" if probe.converged[g] else "no"
        lines.append(
            f"{dim:6d}  {row['top1']:7.2f}  {row['top5']:7.2f}  {probe.loss[g]:10.4f}  "
            f"{probe.weight_decay[g]:12g}  {probe.gradient[g]:8.1e}  {probe.iterations[g]:10d}  "
            f"{converged:>9}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
