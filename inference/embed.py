"""A data set through a model: embeddings as memory-mapped arrays, labels, names and what made them,
in one folder.

    matryoshka embed --path runs/demo/mrl/model.safetensors --data train.beton --output
    embeddings/train matryoshka embed --path torchvision:resnet50 --data photos --output
    embeddings/photos --dtype float16 torchrun --standalone --nproc-per-node=8 inference/embed.py
    --path final_weights.pt --mrl --data ... --output ...

Killed at any moment and started again with the same options, it goes on where it was; the files are
the same in the end, also for another number of processes. Nothing of the data set's size is held in
memory but its list of images. Several processes need one file system. docs/retrieval.md describes
the files; `matryoshka.embeddings.open_embeddings` reads them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from matryoshka import config, distributed
from matryoshka.data import open_dataset
from matryoshka.data.resized_images import CROP, RESIZE
from matryoshka.embeddings.reading import DTYPES
from matryoshka.evaluation.embedding import PREPROCESSING, Job, check, embed, load


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
    with distributed.joined(args.device) as world:
        job = Job(model, dataset, dataset.labels, args, world, print)
        job.announce()
        if embed(job, args.output, args.overwrite) and world.is_main:
            print(f"written  {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
