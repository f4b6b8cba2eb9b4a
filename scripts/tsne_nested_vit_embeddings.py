"""t-SNE plots of the embeddings of all exports.

    python scripts/tsne_nested_vit_embeddings.py --nested_dir checkpoint/nested_models

Other options are those of `matryoshka dims`. Paths are relative to the repository's root.
"""

import argparse
import os
from pathlib import Path

from matryoshka import cli

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("--nested_dir", default="checkpoint/nested_models")
parser.add_argument("--dataset", default="cifar10")
parser.add_argument("--bs", default="256", help="images of a batch")
parser.add_argument("--size", default=None, help="pixels; unset: as the models say")
parser.add_argument("--num_workers", default="8")
parser.add_argument("--max_samples", default="5000", help="-1: all")
parser.add_argument("--perplexity", default="30")
parser.add_argument("--random_state", default="42")
parser.add_argument("--output_dir", default="tsne_plots")
args, more = parser.parse_known_args()
os.chdir(Path(__file__).resolve().parents[1])
words = ["dims", "--path", args.nested_dir, "--dataset", args.dataset, "--batch-size", args.bs]
words += ["--workers", args.num_workers, "--max_samples", args.max_samples, "--map", "tsne"]
words += ["--perplexity", args.perplexity, "--seed", args.random_state, "--no-latency"]
words += ["--output", args.output_dir, *(["--resolution", args.size] if args.size else [])]
raise SystemExit(cli.main([*words, *more]))
