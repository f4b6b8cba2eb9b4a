"""Keep runs of `matryoshka train`: accuracy of every prefix on the validation set, speed and curve.

    matryoshka train --model.mrl=1 ... --logging.folder=runs --logging.run_id=mrl
    python bench/accuracy.py runs/mrl --data "Tiny-ImageNet, 50 classes" --record

RUN is a finished run folder; several are rows of one table. The accuracies are those of the last
line of its log; hardware, versions and commit are those of the run. The validation set must still
be where the run found it, to count its images.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path

from record import append_lines
from small_images import last_of_each_start

from matryoshka.checkpoint import load_model
from matryoshka.data import open_dataset


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    p.add_argument("--data", required=True, help="what the images are")
    p.add_argument("--record", action="store_true", help="append to bench/results/")
    args = p.parse_args(argv)
    for run in args.runs:
        row = row_of(run, args.data)
        pairs = zip(row["dims"], row["top1"], strict=True)
        top1 = "  ".join(f"{dim}: {value:.2f}" for dim, value in pairs)
        print(f"{row['model']}, {row['training']}, {row['images']:,} images: {top1}")
        if args.record:
            append_lines("accuracy", [row])
    return 0


def row_of(run: Path, data: str) -> dict:
    """A finished run as a row of results/accuracy.jsonl."""
    params = json.loads((run / "params.json").read_text())
    env = json.loads((run / "env.json").read_text())
    log = [json.loads(line) for line in (run / "log").read_text().splitlines()]
    if len(log) != params["training.epochs"]:
        raise SystemExit(f"{run}: {len(log)} of {params['training.epochs']} epochs: not finished")
    spec = load_model(run / "model.safetensors").spec
    last = log[-1]
    images = len(open_dataset(params["data.val_dataset"]))
    sizes = [params["resolution.min_res"], params["resolution.max_res"]]
    pixels = " to ".join(str(size) for size in dict.fromkeys(sizes))
    minutes = sum(last_of_each_start([line["relative_time"] for line in log])) / 60
    speeds = [line["images_per_s"] for line in log]
    # Upstream's keys: a single prefix has top_1, without its dim.
    ends = [f"_{dim}" for dim in spec.dims] if len(spec.dims) > 1 else [""]
    return {
        "date": datetime.date.fromtimestamp(last["timestamp"]).isoformat(),
        "case": "classification",
        "data": f"{data}, {images:,} held-out images",
        "model": f"{spec.arch}, {spec.head_name}" + ", BlurPool" * spec.blurpool,
        "training": f"{len(log)} epochs, {pixels} px, {minutes:.1f} min",
        "images": images,
        "n": 1,
        "dims": list(spec.dims),
        "top1": [round(100 * last[f"top_1{end}"], 3) for end in ends],
        "top5": [round(100 * last[f"top_5{end}"], 3) for end in ends],
        "epochs": len(log),
        "minutes": minutes,
        # The first epoch has the choice of kernels in it.
        "images_per_s": statistics.median(speeds[1:] or speeds),
        "precision": params["training.precision"],
        "resident": params["data.resident"],
        "curve": [{"epoch": line["epoch"], "train_loss": line["train_loss"]} for line in log],
        "git": env["git"],
        "hardware": env["hardware"],
        "versions": env["versions"],
    }


if __name__ == "__main__":
    sys.exit(main())
