"""Evaluate one model: loss, accuracy, accuracy of each class, confusion matrix.

    python scripts/separate_vit_evaluator.py --model_path checkpoint/nested_models/NAME_dim64.pth

Other options are those of `matryoshka dims`. Paths are relative to the repository's root; results:
eval_results/<model>/, and TensorBoard's in runs/eval_<model>.
"""

import argparse
import os
from pathlib import Path

from matryoshka import cli

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("--model_path", required=True)
parser.add_argument("--dataset", default="cifar10")
parser.add_argument("--bs", default="100", help="images of a batch")
parser.add_argument("--size", default=None, help="pixels; unset: as the model says")
parser.add_argument("--num_workers", default="8")
parser.add_argument("--notb", action="store_true", help="no TensorBoard")
args, more = parser.parse_known_args()
os.chdir(Path(__file__).resolve().parents[1])
name = Path(args.model_path).stem
words = ["dims", "--path", args.model_path, "--dataset", args.dataset, "--batch-size", args.bs]
words += ["--workers", args.num_workers, "--map", "none", "--no-latency"]
words += ["--output", f"eval_results/{name}", *(["--resolution", args.size] if args.size else [])]
words += [] if args.notb else ["--tensorboard", f"runs/eval_{name}"]
raise SystemExit(cli.main([*words, *more]))
