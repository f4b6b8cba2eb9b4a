"""Embed a data set: a folder of memory-mapped arrays with labels, names and a description.

    matryoshka embed --path model.safetensors --data train.beton --output embeddings/train
    matryoshka embed --path torchvision:resnet50 --data photos --output e --dtype float16
    torchrun --standalone --nproc-per-node=8 inference/embed.py --path ... --data ... --output ...

A killed run resumes when it is started again with the same options; the files are the same as
without interruption, for any number of processes. Several processes need one file system. Memory
use is independent of the data set's size, except for the list of file names. docs/retrieval.md
describes the files; `matryoshka.embeddings.open_embeddings` reads them.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Sequence

from matryoshka import config, distributed
from matryoshka.checkpoint.published import load_any
from matryoshka.data import open_dataset
from matryoshka.data.resized_images import CROP, RESIZE
from matryoshka.embeddings.reading import DTYPES
from matryoshka.evaluation.embedding import EmbeddingJob, EmbeddingOptions, embed
from matryoshka.evaluation.preprocessing import PREPROCESSING, set_preprocessing
from matryoshka.models import NestedModel


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="embed.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--path",
        required=True,
        help="model.safetensors, upstream's final_weights.pt, torchvision:NAME[.WEIGHTS] or "
        "timm:NAME",
    )
    p.add_argument("--data", required=True, help="a .beton file, or a folder of class folders")
    p.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder of the embeddings, made where it is missing",
    )
    p.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="of the embeddings on disk; default: float32",
    )
    p.add_argument(
        "--truncate-dim", type=int, metavar="D", help="only the first D numbers of every embedding"
    )
    p.add_argument(
        "--normalize",
        action="store_true",
        help="to length 1, after truncation; default: as they come",
    )
    p.add_argument(
        "--preprocessing",
        default="checkpoint",
        choices=PREPROCESSING,
        help=f"upstream: shorter side resized to {RESIZE} by Pillow, central {CROP} pixels; "
        "ffcv: central crop of "
        "224/256 of the shorter side, resized by area to the checkpoint's size; default: as the "
        "checkpoint says",
    )
    p.add_argument("--resolution", type=int, help="pixels; default: as the checkpoint says")
    p.add_argument(
        "--overwrite",
        action="store_true",
        help="replace other embeddings in DIR once these are whole",
    )
    p.add_argument("--mrl", action="store_true", help="an upstream checkpoint trained with MRL")
    p.add_argument("--efficient", action="store_true", help="with --mrl: MRL-E")
    p.add_argument("--rep_size", type=int, help="width of an upstream fixed-feature checkpoint")
    p.add_argument(
        "--old_ckpt",
        action="store_true",
        help="an upstream checkpoint with the keys of its first release",
    )
    p.add_argument("--batch-size", type=int, default=256, help="images per process")
    p.add_argument(
        "--workers", type=int, default=0, help="decoding threads per process; default: all cores"
    )
    p.add_argument("--device", default="auto", choices=distributed.DEVICES)
    p.add_argument("--precision", default="fp32", choices=distributed.PRECISIONS)
    return p


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check(args)
    dataset = open_dataset(args.data)
    model = load(args)
    options = EmbeddingOptions(
        checkpoint=args.path,
        preprocessing=args.preprocessing,
        truncate_dim=args.truncate_dim,
        normalize=args.normalize,
        dtype=args.dtype,
        precision=args.precision,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    with distributed.joined(args.device) as world:
        job = EmbeddingJob(model, dataset, options, world=world)
        if world.is_main:
            print("\n".join(job.summary()))
        written = embed(job, args.output, report=print, overwrite=args.overwrite)
        if written and world.is_main:
            print(f"written  {args.output}")
    return 0


def check(args: Namespace) -> None:
    """ConfigError for option values that are out of range."""
    if args.batch_size < 1 or not 0 <= args.workers <= 1024:
        raise config.ConfigError("--batch-size must be 1 or more, --workers 0 to 1024")
    if args.resolution is not None and not 1 <= args.resolution <= 8192:
        raise config.ConfigError(f"--resolution {args.resolution}: expected 1 to 8192")


def load(args: Namespace) -> NestedModel:
    """The model of --path with the preprocessing of the options."""
    model = load_any(
        args.path,
        mrl=args.mrl and not args.efficient,  # upstream's MRL-E is --mrl --efficient
        efficient=args.efficient,
        rep_size=args.rep_size,
        old_ckpt=args.old_ckpt,
    )
    set_preprocessing(model, args.preprocessing, args.resolution)
    return model


if __name__ == "__main__":
    raise SystemExit(main())
