"""Keep runs of `matryoshka ssl`: neighbours, probe and monitors of every prefix, cost, and curve.

    matryoshka ssl --config-file ssl_configs/relic_cifar10.yaml --data cifar10
    python bench/ssl_runs.py RUN --recipe relic_cifar10.yaml --data "CIFAR-10, JPEG copy" --record
    python bench/ssl_runs.py RUN --against PLAIN_RUN --recipe ... --data ... --record

RUN is a finished run folder. Hardware, versions and commit are those of the run. The images must
still be where the run found them: beside its numbers stand those of raw pixels, by the same vote.
--against: the same method without prefixes; the paired difference of the full width's votes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from record import append_lines
from sklearn.neighbors import KNeighborsClassifier
from small_images import last_of_each_start
from width_families import wald

from matryoshka.checkpoint import load_model
from matryoshka.data import CenterCrop, Loader
from matryoshka.data.sources import open_images
from matryoshka.evaluation.neighbours import weighted_knn
from matryoshka.evaluation.predict import extract_features
from matryoshka.report.claims import paired
from matryoshka.report.tables import wilson_interval

PIXELS = 32  # side of the images whose raw pixels are compared


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    p.add_argument("--recipe", required=True, help="file of ssl_configs/, or a name")
    p.add_argument("--data", required=True, help="what the images are")
    p.add_argument("--against", type=Path, metavar="RUN", help="a run without prefixes")
    p.add_argument("--record", action="store_true", help="append to bench/results/")
    args = p.parse_args(argv)
    rows = [{"recipe": args.recipe, "data": args.data, **row_of(run)} for run in args.runs]
    if args.against is not None:
        for run, row in zip(args.runs, rows, strict=True):
            row["against"] = compared(run, args.against)
    for row in rows:
        votes = "  ".join(f"{dim}: {value:.2f}" for dim, value in row["knn20"].items())
        print(
            f"{row['method']}, {row['minutes']:.1f} min, {row['epochs']} epochs, "
            f"{row['pflop']:.2f} PFLOP, kNN {votes}; raw pixels {row['pixels']:.2f}"
        )
        if "against" in row:
            found = row["against"]
            low, high = found["interval"]
            print(
                f"full width against plain: {found['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
            )
    if args.record:
        append_lines("ssl_runs", rows)
    return 0


def row_of(run: Path) -> dict:
    """A finished run as a row of results/ssl_runs.jsonl."""
    results = json.loads((run / "results.json").read_text())
    params = json.loads((run / "params.json").read_text())
    env = json.loads((run / "env.json").read_text())
    log = [json.loads(line) for line in (run / "log").read_text().splitlines()]
    queries = open_images([params["data.val_dataset"]])
    knn = {dim: votes["20"] for dim, votes in results["knn"].items()}
    kept = ("epoch", "train_loss", "knn20/", "probe/", "std/", "rank/")
    return {
        "run": run.name,
        "method": results["method"],
        "projector": params["ssl.projector"],
        "arch": params["model.arch"],
        "arch_options": params["model.arch_options"],
        "seed": params["training.seed"],
        "precision": params["training.precision"],
        "epochs": len(log),
        "minutes": sum(last_of_each_start([line["relative_time"] for line in log])) / 60,
        "images_per_s": statistics.median(line["images_per_s"] for line in log),
        "pflop": results["pflop"],
        "images": len(queries),
        "knn20": knn,
        "knn200": {dim: votes.get("200") for dim, votes in results["knn"].items()},
        "interval": {dim: wilson_interval(value, len(queries)) for dim, value in knn.items()},
        "probe": results["probe"],
        "std": results["std"],
        "rank": results["rank"],
        "pixels": of_pixels(params["data.train_dataset"], params["data.val_dataset"]),
        "curve": [
            {name: value for name, value in line.items() if name.startswith(kept)} for line in log
        ],
        "git": env["git"],
        "hardware": env["hardware"],
        "versions": env["versions"],
    }


def compared(run: Path, plain: Path) -> dict:
    """The vote of 20 neighbours at full width: this run less the plain one, on the same images."""
    pair = paired(right_votes(run), right_votes(plain))
    difference = 100 * (pair.first_only - pair.second_only) / pair.images
    error = 100 * wald(pair)
    return {
        "run": plain.name,
        "difference": difference,
        "interval": [difference - error, difference + error],
        "images": pair.images,
    }


def right_votes(run: Path) -> np.ndarray:
    """Whether the vote is right, bool [N], by scikit-learn's neighbours."""
    params = json.loads((run / "params.json").read_text())
    model = load_model(run / "model.safetensors")
    sets = []
    for path in (params["data.train_dataset"], params["data.val_dataset"]):
        crop = CenterCrop(params["validation.resolution"], params["validation.crop_ratio"])
        loader = Loader(open_images([path]), 1000, order="sequential", crop=crop)
        sets.append(extract_features(model, loader, len(loader.dataset)))
    (known, known_labels), (asked, labels) = sets
    # scikit-learn takes a function, too, which its default, a word, hides from type checkers
    votes = KNeighborsClassifier(20, metric="cosine", weights=_weights)  # type: ignore[arg-type]
    votes.fit(known.numpy(), known_labels.numpy())
    return votes.predict(asked.numpy()) == labels.numpy()


def _weights(distance: np.ndarray) -> np.ndarray:
    return np.exp(-distance / 0.07)  # the temperature of the runs' own vote


def of_pixels(train: str, test: str) -> float:
    """Top-1 % of the weighted vote of 20 neighbours by the raw pixels."""
    known, known_labels = pixels(train)
    asked, labels = pixels(test)
    width = known.shape[1]
    # Less the mean image, whose share of every cosine is large: 46 % instead of 35 % on CIFAR-10.
    known, asked = known - known.mean(0), asked - known.mean(0)
    return weighted_knn(known, known_labels, asked, labels, [width], k=(20,))[width][20]


def pixels(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels [N, 3 x PIXELS^2], labels [N]) of a data set."""
    loader = Loader(open_images([path]), 1000, order="sequential", crop=CenterCrop(PIXELS, 1.0))
    images, labels = zip(*((b.images.flatten(1).float(), b.labels) for b in loader), strict=True)
    return torch.cat(images), torch.cat(labels)


if __name__ == "__main__":
    sys.exit(main())
