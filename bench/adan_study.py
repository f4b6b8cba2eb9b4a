"""Adan, Adam and AdamW at equal budgets: train_cifar10.py with the flags of the papers' programs.

    python bench/adan_study.py --data cifar10-jpeg --output runs/adan_study --record

DIR has train/<class>/ and test/<class>/. Every optimizer trains the same net on the same images for
as many epochs, once for each seed; the test set is used once, at the end of a run. Rate, betas and
decay of Adan are the best of the published sweep (53.01 % after 5 epochs on all images); Adam has
no decay there. The same command continues a study that was interrupted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import append
from scipy.stats import t

PROGRAM = Path(__file__).resolve().parents[1] / "train" / "train_cifar10.py"
FLAGS = {
    "adan": "--lr=0.0009 --weight_decay=0.02 "
    "--adan_beta1=0.035 --adan_beta2=0.11 --adan_beta3=0.015",
    "adam": "--lr=0.0009",
    "adamw": "--lr=0.0009 --weight_decay=0.02",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="run folders, and the subset")
    parser.add_argument("--net", default="vit_small")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=10_000, help="of the training set; 0: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=tuple(FLAGS), default=list(FLAGS))
    parser.add_argument("--more", default="", help="flags for every run, as one text")
    for name, flags in FLAGS.items():
        parser.add_argument(f"--{name}", default=flags, help=f"flags of {name}, as one text")
    parser.add_argument("--record", action="store_true", help="append to bench/results/")
    args = parser.parse_args(argv)

    data = subset(args.data, args.output / f"images-{args.images}", args.images)
    rows = []
    for name in args.only:
        accuracies = []
        for seed in range(args.seeds):
            flags = [*shlex.split(getattr(args, name)), *shlex.split(args.more)]
            flags += [f"--net={args.net}", f"--n_epochs={args.epochs}", f"--data={data}"]
            accuracies.append(measure(name, seed, flags, args.output))
            print(f"{name:6} seed {seed}  {accuracies[-1]:.2f} %", flush=True)
        rows.append({"optimizer": name, "flags": getattr(args, name), "test top-1 %": accuracies})
    add_statistics(rows)
    for row in rows:
        row |= {"net": args.net, "epochs": args.epochs, "images": args.images, "more": args.more}
    print(table(rows))
    if args.record:
        print(append("adan_study", rows))
    return 0


def subset(data: Path, folder: Path, images: int) -> Path:
    """A folder of links to the first images of each class, and to the whole test set."""
    if images == 0:
        return data
    if folder.exists():
        return folder  # of an earlier call
    made = folder.with_name(f".{folder.name}")  # whole before it has its name
    shutil.rmtree(made, ignore_errors=True)
    classes = sorted(path for path in (data / "train").iterdir() if path.is_dir())
    for number, source in enumerate(classes):
        # As equal as possible: the first classes have one image more.
        count = images // len(classes) + (number < images % len(classes))
        target = made / "train" / source.name
        target.mkdir(parents=True)
        files = sorted(source.iterdir())
        if len(files) < count:
            raise SystemExit(f"{source}: {len(files)} images, {count} are needed; lower --images")
        for file in files[:count]:
            (target / file.name).symlink_to(file.resolve())
    for part in ("test", "val"):
        if (data / part).is_dir():
            (made / part).symlink_to((data / part).resolve())
    made.rename(folder)
    return folder


def measure(name: str, seed: int, flags: Sequence[str], output: Path) -> float:
    """Top-1 in percent on the test set after a run, which is not repeated if it has ended."""
    settings = zlib.crc32(shlex.join(flags).encode())  # other flags are another run
    run = output / f"{name}-{seed}-{settings:08x}"
    results = run / "results.json"
    if not results.exists():
        words = [sys.executable, str(PROGRAM), f"--opt={name}", f"--seed={seed}", *flags]
        words += [f"--logging.folder={output}", f"--logging.run_id={run.name}"]
        words += ["--training.resume=auto", "--cifar.seed_outputs=0", "--nowandb"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    top1 = json.loads(results.read_text())["test"]["top_1"]
    return top1[max(top1, key=int)]


def add_statistics(rows: Sequence[dict[str, Any]]) -> None:
    """Mean with a 95 % interval over seeds, and the paired difference to the first row."""
    first = rows[0]["test top-1 %"]
    for row in rows:
        values = row["test top-1 %"]
        row["mean"], row["interval"] = mean_interval(values)
        if row is not rows[0]:
            differences = [value - base for value, base in zip(values, first, strict=True)]
            row["difference"], row["difference interval"] = mean_interval(differences)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval by Student's t); 0 wide for a single value."""
    if len(values) < 2:
        return values[0], 0.0
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(t.ppf(0.975, len(values) - 1)) * error


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"          test top-1 %, n = {len(rows[0]['test top-1 %'])} seeds, 95 % intervals"]
    for row in rows:
        line = f"{row['optimizer']:8} {row['mean']:6.2f} +- {row['interval']:.2f}"
        if "difference" in row:
            line += f"   against {rows[0]['optimizer']}, paired: {row['difference']:+.2f}"
            line += f" +- {row['difference interval']:.2f}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
