"""Evaluate one model: loss, accuracy, accuracy of each class, confusion matrix.

Further options: `matryoshka dims`. Paths are relative to the root; results: eval_results/<model>/.
"""

import argparse
import os
from pathlib import Path

from matryoshka import cli
from matryoshka.evaluation.run_images import run_with_images

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("--model_path", required=True)
parser.add_argument("--dataset", default=None, help="unset: the run's test set, else cifar10")
parser.add_argument("--bs", default="100", help="images of a batch")
parser.add_argument("--size", default=None, help="pixels; unset: as the model says")
parser.add_argument("--num_workers", default="8")
parser.add_argument("--notb", action="store_true", help="no TensorBoard")
args, more = parser.parse_known_args()
os.chdir(Path(__file__).resolve().parents[1])
name = Path(args.model_path).stem
if args.dataset is None and run_with_images(args.model_path) is None:
    args.dataset = "cifar10"
words = ["--batch-size", args.bs, "--workers", args.num_workers, "--map", "none", "--no-latency"]
words += ["--dataset", args.dataset] if args.dataset else []
words += ["--resolution", args.size] if args.size else []
words += [] if args.notb else ["--tensorboard", f"runs/eval_{name}"]
words += ["--path", args.model_path, "--output", f"eval_results/{name}", *more]
raise SystemExit(cli.main(["dims", *words]))
