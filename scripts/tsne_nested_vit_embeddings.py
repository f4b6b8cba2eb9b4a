"""t-SNE plots of the embeddings of all exports; further options: `matryoshka dims`."""

import argparse
import os
from pathlib import Path

from matryoshka import cli
from matryoshka.evaluation.run_images import run_with_images

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("--nested_dir", default="checkpoint/nested_models")
parser.add_argument("--dataset", default=None, help="unset: the run's test set, else cifar10")
parser.add_argument("--bs", default="256", help="images of a batch")
parser.add_argument("--size", default=None, help="pixels; unset: as the models say")
parser.add_argument("--num_workers", default="8")
parser.add_argument("--max_samples", default="5000", help="-1: all")
parser.add_argument("--random_state", default="42")
parser.add_argument("--output_dir", default="tsne_plots")
args, more = parser.parse_known_args()
os.chdir(Path(__file__).resolve().parents[1])
files = sorted(Path(args.nested_dir).glob(f"*_{args.dataset or '*'}_*_dim*"), key=os.path.getmtime)
newest = files[-1] if files else Path()
family = newest.name.rpartition("_dim")[0] + "_dim"
models = [str(f) for f in files if f.name.startswith(family) and f.suffix == newest.suffix]
if args.dataset is None and None in map(run_with_images, models):
    args.dataset = "cifar10"
words = ["--batch-size", args.bs, "--workers", args.num_workers, "--max_samples", args.max_samples]
words += ["--map", "tsne", "--seed", args.random_state, "--no-latency", "--output", args.output_dir]
words += ["--dataset", args.dataset] if args.dataset else []
words += ["--resolution", args.size] if args.size else []
raise SystemExit(cli.main(["dims", "--path", *(models or [args.nested_dir]), *words, *more]))
