"""Keep runs of `matryoshka cifar`: accuracy of every dim on the test set, cost, and curve.

    matryoshka cifar --config-file vit_configs/fast_cnn.yaml --data cifar10
    python bench/small_images.py RUN --recipe fast_cnn.yaml --data "CIFAR-10, JPEG copy" --record

RUN is a finished run folder; several are seeds of one recipe. Hardware, versions and commit are
those of the run. The test set must still be where the run found it, to count its images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

from record import append_lines

from matryoshka.data import open_dataset
from matryoshka.report.tables import wilson_interval


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    p.add_argument("--recipe", required=True, help="file of vit_configs/, or a name")
    p.add_argument("--data", required=True, help="what the images are")
    p.add_argument("--record", action="store_true", help="append to bench/results/")
    args = p.parse_args(argv)
    rows = [{"recipe": args.recipe, "data": args.data, **row_of(run)} for run in args.runs]
    for row in rows:
        top1 = "  ".join(f"{dim}: {value:.2f}" for dim, value in row["top1"].items())
        print(f"{row['minutes']:.1f} min, {row['epochs']} epochs, {row['images']:,} images: {top1}")
    if args.record:
        append_lines("small_images", rows)
    return 0


def row_of(run: Path) -> dict:
    """A finished run as a row of results/small_images.jsonl."""
    results = json.loads((run / "results.json").read_text())
    params = json.loads((run / "params.json").read_text())
    env = json.loads((run / "env.json").read_text())
    log = [json.loads(line) for line in (run / "log").read_text().splitlines()]
    images = len(open_dataset(params["data.val_dataset"]))
    top1 = results["test"]["top_1"]
    curve = []
    for line in log:
        accuracy = {name: value for name, value in line.items() if name.startswith("top_1")}
        curve.append({"epoch": line["epoch"], "train_loss": line["train_loss"], **accuracy})
    return {
        "run": run.name,
        "arch": params["model.arch"],
        "seed": params["training.seed"],
        "precision": params["training.precision"],
        "epochs": len(log),
        "minutes": sum(last_of_each_start([line["relative_time"] for line in log])) / 60,
        "images_per_s": statistics.median(line["images_per_s"] for line in log),
        "images": images,
        "top1": top1,
        "interval": {dim: wilson_interval(value, images) for dim, value in top1.items()},
        "validation": results.get("validation", {}).get("top_1"),
        "curve": curve,
        "git": env["git"],
        "hardware": env["hardware"],
        "versions": env["versions"],
    }


def last_of_each_start(seconds: list[float]) -> list[float]:
    """A run's times at the ends of its epochs, which begin at 0 after each resume."""
    return [a for a, b in itertools.pairwise([*seconds, 0.0]) if b < a]


if __name__ == "__main__":
    sys.exit(main())
