"""Draw the confusion matrices of all results again, in one folder.

Paths are relative to the root.
"""

import argparse
import json
import os
from pathlib import Path

from matryoshka.files import write_atomically
from matryoshka.report.dim_plots import plot_confusion

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("--results_dir", default="eval_results")
parser.add_argument("--output_dir", default=None, help="unset: --results_dir")
args = parser.parse_args()
os.chdir(Path(__file__).resolve().parents[1])
files = sorted(Path(args.results_dir).rglob("dims.json"), key=os.path.getmtime)  # newest wins
if not files:
    raise SystemExit(f"error: {args.results_dir}: has no dims.json; run evaluate_all_nested_models")
folder = Path(args.output_dir or args.results_dir)
folder.mkdir(parents=True, exist_ok=True)
for file in files:
    found = json.loads(file.read_text())
    for dim, matrix in found["confusion"].items():
        name = file.parent.name.removesuffix(f"_dim{dim}")
        path = folder / f"{name}_dim{dim}_confusion_matrix.png"
        write_atomically(path, plot_confusion(matrix, found["class_names"], f"{name}, dim {dim}"))
        print(f"written  {path}")
