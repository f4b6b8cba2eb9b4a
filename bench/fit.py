"""`fit` beside `train` with its defaults, in the same time on the same photos.

    python bench/fit.py --photos tiny20 --minutes 10 --record
    python bench/fit.py --photos tiny15 --minutes 5 --only fit

PHOTOS has train/<class>/ and val/<class>/. `train` (--model.mrl=1, else its defaults) is stopped
when the time of `fit` is over, and its last checkpoint is evaluated on the same images.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import append

from matryoshka.report.tables import wilson_interval

MATRYOSHKA = str(Path(sys.executable).parent / "matryoshka")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", choices=("fit", "train"))
    parser.add_argument("--record", action="store_true", help="append to bench/results/fit.jsonl")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        seconds = 60 * args.minutes
        if args.only != "train":
            row = measure_fit(args.photos, args.minutes, Path(folder))
            seconds = row["seconds"]
            rows.append(row)
        if args.only != "fit":
            rows.append(measure_train(args.photos, seconds, Path(folder)))
    for row in rows:
        row |= {"photos": args.photos.name, "minutes": args.minutes}
        print(json.dumps(row))
    if args.record:
        print(append("fit", rows))
    return 0


def measure_fit(photos: Path, minutes: float, folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    words = ["fit", str(photos), f"--minutes={minutes}", f"--output={folder / 'fit'}"]
    first_line = run_until_first_line([MATRYOSHKA, *words])
    seconds = time.perf_counter() - started
    results = json.loads((folder / "fit" / "results.json").read_text())
    state = json.loads((folder / "fit" / "fit.json").read_text())
    chosen = state["choices"]
    return {
        "case": "fit",
        "seconds": round(seconds, 1),
        "first_line_seconds": round(first_line, 1),
        "arch": chosen["model.arch"],
        "resolution": chosen["resolution.max_res"],
        "epochs": chosen["training.epochs"],
        **accuracies(results),
        "curve": curve(folder / "fit"),
    }


def run_until_first_line(command: list[str]) -> float:
    """Run a command to its end, passing its output on; seconds until its first line."""
    started = time.perf_counter()
    first = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            first = first or time.perf_counter() - started
            print(line, end="", flush=True)
    if process.returncode:
        raise SystemExit(process.returncode)
    return first


def measure_train(photos: Path, seconds: float, folder: Path) -> dict[str, Any]:
    """`train` with its defaults, stopped after `seconds` and evaluated on its last checkpoint."""
    command = [MATRYOSHKA, "train", "--model.mrl=1"]
    command += [f"--data.{part}_dataset={photos / part}" for part in ("train", "val")]
    command += [f"--logging.folder={folder}", "--logging.run_id=train"]
    with subprocess.Popen(command) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
    checkpoint = folder / "train" / "checkpoints" / "last.safetensors"
    output = folder / "train.json"
    command = [MATRYOSHKA, "eval", "--path", str(checkpoint), "--data-root", str(photos / "val")]
    subprocess.run([*command, "--output", str(output)], check=True)
    after_epochs = curve(folder / "train")
    return {
        "case": "train",
        "seconds": round(seconds, 1),
        "epochs": len(after_epochs),
        **accuracies(json.loads(output.read_text())),
        "curve": after_epochs,
    }


def accuracies(results: dict[str, Any]) -> dict[str, Any]:
    """Top-1 of every prefix with its 95 % interval."""
    images = results["images"]
    top1 = {dim: round(row["top1"], 2) for dim, row in results["prefixes"].items()}
    intervals = {}
    for dim, percent in top1.items():
        low, high = wilson_interval(percent, images)
        intervals[dim] = [round(low, 1), round(high, 1)]
    return {"images": images, "top1": top1, "interval": intervals}


def curve(run: Path) -> list[float]:
    """Top-1 in percent of the longest prefix, after every epoch."""
    values = []
    if not (run / "log").exists():  # no epoch is finished
        return values
    for line in (run / "log").read_text().splitlines():
        row = json.loads(line)
        found = [value for name, value in row.items() if name.startswith("top_1")]
        if found:
            values.append(round(100 * found[-1], 1))
    return values


if __name__ == "__main__":
    raise SystemExit(main())
