"""Two families of widths on the same test images: paired differences, parameters, cascade.

    matryoshka eval --path NESTED/model.safetensors --save_logits --save_gt --output n/test.json
    matryoshka eval --path NESTED/model.safetensors --split validation --save_logits --save_gt \\
        --output n/validation.json
    matryoshka analyze --results n/test.json --validation n/validation.json --only widths \\
        --output n/widths.json
    matryoshka eval --path INDEPENDENT/model.safetensors --save_logits --save_gt \\
        --output i/test.json
    python bench/width_families.py n/test.json i/test.json --cascade n/widths.json --record

The difference of a dim is the first family's top-1 less the second's, with the 95 % interval of a
paired difference of proportions (Newcombe 1998, method 5, Wald). Of the cascades that the analysis
chose on validation images, the most accurate one within --budget of the widest member's
multiply-adds is kept, measured on the test images.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from record import append

from matryoshka.checkpoint import load_model
from matryoshka.report.claims import Paired, paired

Z_95 = 1.959964


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("first", type=Path, help="results of eval, with logits and labels")
    p.add_argument("second", type=Path, help="the same of the other family")
    p.add_argument("--cascade", type=Path, help="analysis of the first family's widths")
    p.add_argument("--budget", type=float, default=55.0, help="%% of the widest's multiply-adds")
    p.add_argument("--record", action="store_true", help="append to bench/results/")
    args = p.parse_args(argv)
    row = compared(args.first, args.second)
    for dim, found in row["dims"].items():
        low, high = found["interval"]
        print(
            f"{dim:>5}  {found['first']:.2f} and {found['second']:.2f} %, difference "
            f"{found['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
        )
    print(f"parameters {row['parameters'][0]:,} and {row['parameters'][1]:,}")
    if args.cascade:
        row["cascade"] = within(args.cascade, args.budget)
        print(f"cascade  {row['cascade']}")
    if args.record:
        print(append("width_families", [row]))
    return 0


def compared(first: Path, second: Path) -> dict[str, Any]:
    about = [json.loads(path.read_text()) for path in (first, second)]
    right, labels = [], []
    for path, each in zip((first, second), about, strict=True):
        found = hits(path, each)
        right.append(found[0])
        labels.append(found[1])
    if about[0]["dims"] != about[1]["dims"] or not np.array_equal(labels[0], labels[1]):
        raise SystemExit(f"{first} and {second}: of different dims or images")
    dims = {}
    for g, dim in enumerate(about[0]["dims"]):
        pair = paired(right[0][g], right[1][g])
        difference = 100 * (pair.first_only - pair.second_only) / pair.images
        error = 100 * wald(pair)
        dims[str(dim)] = {
            "first": 100 * float(right[0][g].mean()),
            "second": 100 * float(right[1][g].mean()),
            "difference": difference,
            "interval": [difference - error, difference + error],
        }
    models = [load_model(each["checkpoint"]) for each in about]
    return {
        "archs": [each["arch"] for each in about],
        "images": about[0]["images"],
        "dims": dims,
        "parameters": [sum(p.numel() for p in model.parameters()) for model in models],
    }


def hits(path: Path, about: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Which images each dim has right, bool [G, N], and the labels."""
    logits = np.load(path.parent / about["arrays"]["logits"])
    labels = np.load(path.parent / about["arrays"]["gt"])
    return logits.argmax(2) == labels, labels


def wald(pair: Paired) -> float:
    """Half the width of the 95 % interval of a paired difference of proportions."""
    n = pair.images
    differing = pair.first_only + pair.second_only
    return Z_95 * math.sqrt(differing - (pair.first_only - pair.second_only) ** 2 / n) / n


def within(path: Path, budget: float) -> dict[str, Any]:
    """The most accurate of the rows within the budget, and what it loses against the widest."""
    found = json.loads(path.read_text())["widths"]
    rows = [row for row in found["rows"] if row["macs_share"] <= budget]
    if not rows:
        raise SystemExit(f"{path}: no cascade within {budget:g} % of the multiply-adds")
    # Rows come by rising cost and validation accuracy: the last one is the best of the budget.
    best = rows[-1]
    pair = Paired(**best["against_widest"])
    error = 100 * wald(pair)
    return {
        "asked": best["asked"],
        "top1": best["top1"],
        "loss": best["loss"],
        "interval": [best["loss"] - error, best["loss"] + error],
        "macs_share": best["macs_share"],
        "shares": best["shares"],
    }


if __name__ == "__main__":
    sys.exit(main())
