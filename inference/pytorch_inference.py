"""Accuracy of every prefix of a checkpoint, all from one forward pass per image.

    python pytorch_inference.py --path runs/demo/mrl/model.safetensors --data-root runs/demo/val.beton
    python pytorch_inference.py --path final_weights.pt --mrl --dataset V1 --data-root /data/imagenet

model.safetensors needs no further flag. Upstream's .pt files take upstream's flags: --mrl, --efficient,
--rep_size. Starts under torchrun too: every image is counted once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from matryoshka import checkpoint, config, distributed
from matryoshka.data import CenterCrop, Loader, open_dataset
from matryoshka.predict import predict
from matryoshka.report import accuracy_table

FOLDERS = {"V1": "val"}  # dataset name -> its folder under --data-root


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="pytorch_inference.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--path", required=True, help="model.safetensors, or upstream's final_weights.pt")
    p.add_argument("--dataset", default="V1", help=f"one of {', '.join(FOLDERS)} (ImageNet-1K validation); default V1")
    p.add_argument(
        "--data-root",
        default=os.environ.get("IMAGENET_DIR", "../../IMAGENET"),
        help="folder that holds the dataset's folder (val for V1); or itself a .beton file or a folder of class "
        "folders; default: $IMAGENET_DIR, else upstream's ../../IMAGENET",
    )
    p.add_argument("--mrl", action="store_true", help="an upstream checkpoint trained with MRL")
    p.add_argument("--efficient", action="store_true", help="with --mrl: MRL-E")
    p.add_argument("--rep_size", type=int, help="width of an upstream fixed-feature checkpoint")
    p.add_argument("--tta", action="store_true", help="add the logits of the mirror image")
    p.add_argument("--workers", type=int, default=0, help="decoding threads; default: all cores")
    p.add_argument("--batch-size", type=int, default=256, help="images per process")
    p.add_argument("--device", default="auto", choices=distributed.DEVICES)
    p.add_argument("--precision", default="fp32", choices=distributed.PRECISIONS)
    p.add_argument("--output", help="also write the table as JSON to this file")
    return p


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.batch_size < 1 or args.workers < 0:
        raise config.ConfigError("--batch-size must be 1 or more, --workers 0 or more")
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise config.ConfigError(f"--output {args.output}: its folder does not exist; make it first")
    dataset = open_dataset(find_data(args.dataset, args.data_root))
    # the flags of upstream say --mrl --efficient for MRL-E; the checkpoint's own words are mrl and efficient
    model = checkpoint.load_model(args.path, args.mrl and not args.efficient, args.efficient, args.rep_size)
    model.check_classes(dataset)
    from matryoshka.metrics import PrefixAccuracy  # torchmetrics takes seconds to import: not before it is needed

    with distributed.joined(args.device) as world:
        precision = distributed.pick_precision(args.precision, world.device)
        model = model.to(world.device).to(memory_format=torch.channels_last)
        loader = Loader(
            dataset,
            args.batch_size * world.size,
            image=CenterCrop(model.preprocessing.size, model.preprocessing.ratio),
            num_workers=args.workers,
            device=world.device,
            rank=world.rank,
            world=world.size,
        )
        started = time.perf_counter()
        metric = PrefixAccuracy(model.dims).to(world.device)
        bar = tqdm(loader, leave=False, unit="batch", disable=not (world.is_main and sys.stderr.isatty()))
        for prediction in predict(model, bar, precision, args.tta):
            metric.update(prediction.logits, prediction.labels)
        accuracy = metric.compute()
        seconds = time.perf_counter() - started

    if world.is_main:
        for note in model.notes:
            print(f"note: {note}")
        print(f"{args.path}: {model.spec.arch}, {model.spec.head_name}, {model.spec.num_classes} classes")
        print(f"{dataset.path}: {len(dataset):,} images at {model.preprocessing.size} px{', tta' if args.tta else ''}")
        print(accuracy_table(accuracy))
        print(
            f"{len(dataset) / seconds:.0f} images/s, {100 * loader.wait / seconds:.0f} % of the time waiting for data"
        )
        if args.output:
            results = {
                "prefixes": {str(d): values for d, values in accuracy.items()},
                "checkpoint": str(args.path),
                "arch": model.spec.arch,
                "head": model.spec.head_name,
                "data": str(dataset.path),
                "images": len(dataset),
                "resolution": model.preprocessing.size,
                "tta": args.tta,
                "precision": precision,
                "images_per_s": len(dataset) / seconds,
            }
            checkpoint.write_atomically(args.output, (json.dumps(results, indent=1) + "\n").encode())
            print(f"results  {args.output}")
    return 0


def find_data(name: str, root: str) -> Path:
    """The .beton file or folder of a dataset. ConfigError for an unknown name or a missing place."""
    known = {key.lower(): folder for key, folder in FOLDERS.items()}
    if name.lower() not in known:
        raise config.ConfigError(f"--dataset {name}: unknown; known: {', '.join(FOLDERS)}")
    path = Path(root)
    if path.is_file():
        return path
    inside = path / known[name.lower()]
    if inside.is_dir():
        return inside
    if path.is_dir():
        return path
    raise config.ConfigError(
        f"--data-root {root}: no such file or folder; give a .beton file, a folder of class folders, or the "
        f"folder that holds {known[name.lower()]}/"
    )


if __name__ == "__main__":
    raise SystemExit(main())
