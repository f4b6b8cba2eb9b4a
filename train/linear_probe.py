"""Nested linear classifiers on the frozen features of any model: the linear probe.

    python linear_probe.py --model.path=runs/ff/model.safetensors --data.train_dataset=train.beton
        \\ --data.val_dataset=val.beton
    python linear_probe.py --model.path=torchvision:resnet50 --model.efficient=1 --probe.solver=sgd
        ...

Features are computed once (central crop, no augmentation), then fitted: matryoshka/probe.py says
what is minimised. Several probe.weight_decay: each is fitted to nine tenths of the training set,
the best on the other tenth, for each prefix (MRL-E: for all), to the whole of it.
<logging.folder>/<run id>/ gets model.safetensors (trunk and nested head: `matryoshka eval --path`
reads it) and results.json. One process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka import checkpoint, config, distributed
from matryoshka.checkpoint.published import load_any
from matryoshka.data import CenterCrop, Loader, open_dataset
from matryoshka.distributed import World
from matryoshka.environment import environment
from matryoshka.evaluation.predict import extract_features
from matryoshka.evaluation.probe import Probe, ProbeError, choose_weight_decay, fit
from matryoshka.evaluation.probe_options import parser
from matryoshka.files import write_atomically
from matryoshka.models import NestedModel, shortest_prefix
from matryoshka.nested import NestedLinear, check_dims, default_dims
from matryoshka.training.loaders import check_classes
from matryoshka.training.run_folder import new_run_id

FINAL = "model.safetensors"


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    cfg = parser().parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise config.ConfigError("linear_probe.py runs as one process; start it without torchrun")
    world = World(distributed.pick_device(cfg.model.device, 0))
    run = Path(cfg.logging.folder) / (cfg.logging.run_id or new_run_id("probe"))
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise config.ConfigError(
            f"{run}: exists; choose another --logging.run_id or --logging.folder"
        )
    sets = {
        "train": open_dataset(cfg.data.train_dataset),
        "val": open_dataset(cfg.data.val_dataset),
    }
    check_sets(**sets)
    model = load_any(cfg.model.path, "model.path")
    dims = prefixes(cfg, model)
    run.mkdir(
        parents=True, exist_ok=True
    )  # hours before it is needed, so that a place that cannot be written is known
    probe_and_save(cfg, model, dims, sets, run, world.device)
    return 0


def check_sets(train, val) -> None:
    for option, dataset in (("data.train_dataset", train), ("data.val_dataset", val)):
        if not len(dataset):
            raise config.ConfigError(f"{option}={dataset.path}: has no images")
        if dataset.labels.min() < 0:
            raise config.ConfigError(
                f"{option}={dataset.path}: has negative labels; write it again with sound ones"
            )
    check_classes(train, val)
    if train.num_classes < 2:
        raise ProbeError(
            f"data.train_dataset={train.path}: has only one class, nothing to tell apart"
        )


def prefixes(cfg: SimpleNamespace, model: NestedModel) -> tuple[int, ...]:
    try:
        if cfg.model.dims is not None:
            return check_dims(cfg.model.dims, model.width)
    except ValueError as error:
        raise config.ConfigError(f"model.dims: {error} ({model.spec.arch})") from None
    return default_dims(model.width, shortest_prefix(cfg.model.nesting_start, model.width))


def probe_and_save(
    cfg, model: NestedModel, dims: tuple[int, ...], sets: dict, run: Path, device: torch.device
) -> None:
    train, num_classes = sets["train"], sets["train"].num_classes
    say = lambda *words: print(*words, flush=True)  # noqa: E731
    say(f"model    {cfg.model.path}: {model.spec.arch}, {model.width} features; dims {list(dims)}")
    say(
        f"data     {len(train):,} images, {num_classes} classes; {len(sets['val']):,} for "
        "validation"
    )
    model = model.to(device).to(memory_format=torch.channels_last)
    precision = distributed.pick_precision(cfg.model.precision, device)
    features, labels, seconds = {}, {}, {}
    for split, dataset in sets.items():
        started = time.perf_counter()
        features[split], labels[split] = extract(model, dataset, cfg, precision, device)
        seconds[f"features_{split}"] = time.perf_counter() - started
    rate = sum(map(len, sets.values())) / sum(seconds.values())
    say(f"features {sum(seconds.values()):.1f} s, {rate:.0f} images/s, {device.type}, {precision}")
    if absent := num_classes - len(torch.unique(labels["train"])):
        say(f"note     {absent} of {num_classes} classes have no training image")

    started = time.perf_counter()
    probe, choice = solve(cfg, features["train"], labels["train"], dims, num_classes, device)
    seconds["fit"] = time.perf_counter() - started
    for decay, top1 in choice.items():
        say(f"held out weight decay {decay:g}: top-1 {'  '.join(f'{v:.1f}' for v in top1)}")
    say(
        f"fit      {seconds['fit']:.1f} s, {cfg.probe.solver}, {solver_dtype(cfg, device)}".replace(
            "torch.", ""
        )
    )

    head = probe.head()
    accuracy = evaluate(head, features["val"], labels["val"])
    say(table(accuracy, probe))
    if not all(probe.converged):
        more = (
            "probe.max_iter"
            if cfg.probe.solver == "lbfgs"
            else "probe.epochs, or take probe.solver=lbfgs"
        )
        say(f"note     not converged to probe.tolerance={cfg.probe.tolerance:g}; raise {more}")
    model.head, model.classes = head, train.classes
    model.spec = replace(
        model.spec, num_classes=num_classes, dims=dims, efficient=cfg.model.efficient
    )
    results = {
        "prefixes": {
            str(d): accuracy[d]
            | {
                "loss": probe.loss[g],
                "gradient": probe.gradient[g],
                "converged": probe.converged[g],
                "iterations": probe.iterations[g],
                "weight_decay": probe.weight_decay[g],
            }
            for g, d in enumerate(dims)
        },
        "held_out_top1": {
            str(decay): dict(zip(map(str, dims), top1, strict=True))
            for decay, top1 in choice.items()
        },
        "checkpoint": cfg.model.path,
        "arch": model.spec.arch,
        "head": model.spec.head_name,
        "train": str(train.path),
        "val": str(sets["val"].path),
        "n_train": len(train),
        "n_val": len(sets["val"]),
        "classes": num_classes,
        "resolution": model.preprocessing.size,
        "crop_ratio": model.preprocessing.ratio,
        "precision": precision,
        "seconds": {name: round(s, 3) for name, s in seconds.items()},
        "environment": environment(),
    }
    options = config.flat(cfg)
    write_atomically(run / "params.json", (json.dumps(options, indent=1) + "\n").encode())
    write_atomically(run / "config.yaml", config.to_yaml(cfg).encode())
    write_atomically(run / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    checkpoint.save_model(model, run / FINAL, options)
    say(f"results  {run / 'results.json'}\nmodel    {run / FINAL}")


def extract(
    model: NestedModel, dataset, cfg, precision: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    crop = CenterCrop(model.preprocessing.size, model.preprocessing.ratio)
    loader = Loader(
        dataset,
        cfg.data.batch_size,
        order="sequential",
        image=crop,
        num_workers=cfg.data.num_workers,
        device=device,
    )
    bar = tqdm(
        loader, desc=dataset.path.name, leave=False, unit="batch", disable=not sys.stderr.isatty()
    )
    features, labels = extract_features(model, bar, len(dataset), precision)
    return features, labels


def solver_dtype(cfg, device: torch.device) -> torch.dtype:
    single = cfg.probe.precision == "fp32" or (
        cfg.probe.precision == "auto" and device.type == "mps"
    )
    return torch.float32 if single else torch.float64


def solve(
    cfg,
    features: Tensor,
    labels: Tensor,
    dims: tuple[int, ...],
    num_classes: int,
    device: torch.device,
) -> tuple[Probe, dict[float, list[float]]]:
    """(the classifiers, {weight decay: held-out top-1 % of every prefix}, empty where there was
    nothing to choose).
    """
    p = cfg.probe
    if device.type == "cuda" and features.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        features = features.to(device)  # else block by block, in every pass
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
    choice = {}
    if len(p.weight_decay) > 1:
        decays, top1 = choose_weight_decay(
            features, labels, dims, num_classes, p.weight_decay, **options
        )
        choice = dict(zip(p.weight_decay, top1, strict=True))
    return fit(features, labels, dims, num_classes, decays, **options), choice


@torch.inference_mode()
def evaluate(head: NestedLinear, features: Tensor, labels: Tensor) -> dict[int, dict[str, float]]:
    """{prefix: {top1, top5}} in percent of the head as it is saved."""
    from matryoshka.evaluation.metrics import (
        PrefixAccuracy,  # torchmetrics takes seconds to import: not before it is needed
    )

    metric = PrefixAccuracy(head.dims)
    for x, y in zip(features.split(1024), labels.split(1024), strict=True):
        metric.update(head(x), y)
    return metric.compute()


def table(accuracy: dict[int, dict[str, float]], probe: Probe) -> str:
    lines = ["prefix  top-1 %  top-5 %  train loss  weight decay  gradient  iterations  converged"]
    for g, (d, row) in enumerate(accuracy.items()):
        lines.append(
            f"{d:6d}  {row['top1']:7.2f}  {row['top5']:7.2f}  {probe.loss[g]:10.4f}  "
            f"{probe.weight_decay[g]:12g}  "
            f"{probe.gradient[g]:8.1e}  {probe.iterations[g]:10d}  "
            f"{'yes' if probe.converged[g] else 'no':>9}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
