"""Accuracy of every prefix of a checkpoint, all from one forward pass per image.

    python pytorch_inference.py --path runs/demo/mrl/model.safetensors --data-root runs/demo/val.beton
    python pytorch_inference.py --path final_weights.pt --mrl --dataset V1 --data-root /data/imagenet
    python pytorch_inference.py --path torchvision:resnet50 --dataset R --save_predictions --save_gt

model.safetensors needs no further flag. Upstream's .pt files take upstream's flags: --mrl, --efficient,
--rep_size. Starts under torchrun too: every image is counted once.

--save_* write logits and softmax, float32 [prefixes, images, classes], predictions, int64 [prefixes, images], and
labels (gt), int64 [images], in the data set's order; for ImageNet-A and -R over their 200 classes.
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
from matryoshka.inference.published import (  # pyright: ignore[reportMissingImports] (folder inference, installed)
    PREFIXES,
    load_published,
)
from matryoshka.inference.resized_images import CROP, RESIZE, ResizedImages  # pyright: ignore[reportMissingImports]
from matryoshka.inference.saved_arrays import (  # pyright: ignore[reportMissingImports]
    KINDS,
    Collected,
    file_names,
    write_array,
)
from tqdm import tqdm

from matryoshka import checkpoint, config, distributed
from matryoshka.data import CenterCrop, Loader, open_dataset
from matryoshka.data.augment import Preprocessing
from matryoshka.imagenet_sets import FOLDERS, canonical, find, match
from matryoshka.predict import predict
from matryoshka.report import accuracy_table

PREPROCESSING = ("checkpoint", "upstream", "ffcv")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="pytorch_inference.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument(
        "--path",
        required=True,
        help="model.safetensors, upstream's final_weights.pt, or as a baseline torchvision:NAME[.WEIGHTS] or timm:NAME",
    )
    p.add_argument(
        "--dataset", default="V1", help=f"one of {', '.join(FOLDERS)}; default V1, the validation set of ImageNet-1K"
    )
    p.add_argument(
        "--data-root",
        default=os.environ.get("IMAGENET_DIR", "../../IMAGENET"),
        help="folder that holds the dataset's folder (val, imagenetv2-matched-frequency-format-val, imagenet-a, "
        "imagenet-r or imagenet-r_, sketch); or itself a .beton file or a folder of class folders, such as another "
        "imagenetv2-*; default: $IMAGENET_DIR, else upstream's ../../IMAGENET",
    )
    p.add_argument("--mrl", action="store_true", help="an upstream checkpoint trained with MRL")
    p.add_argument("--efficient", action="store_true", help="with --mrl: MRL-E")
    p.add_argument("--rep_size", type=int, help="width of an upstream fixed-feature checkpoint")
    p.add_argument("--tta", action="store_true", help="add the logits of the mirror image")
    p.add_argument(
        "--preprocessing",
        default="checkpoint",
        choices=PREPROCESSING,
        help=f"upstream: shorter side resized to {RESIZE} by Pillow, central {CROP} pixels; ffcv: central crop of "
        "224/256 of the shorter side, resized by area to the checkpoint's size; default: as the checkpoint says",
    )
    p.add_argument("--workers", type=int, default=0, help="decoding threads; default: all cores")
    p.add_argument("--batch-size", type=int, default=256, help="images per process")
    p.add_argument("--device", default="auto", choices=distributed.DEVICES)
    p.add_argument("--precision", default="fp32", choices=distributed.PRECISIONS)
    p.add_argument("--output", help="also write the table as JSON to this file; arrays go to its folder")
    for kind in KINDS:
        p.add_argument(f"--save_{kind}", action="store_true", help="write them to a .npy file, here or beside --output")
    p.add_argument("--upstream_names", action="store_true", help="--save_*: upstream's file names and .pth format")
    return p


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.batch_size < 1 or args.workers < 0:
        raise config.ConfigError("--batch-size must be 1 or more, --workers 0 or more")
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise config.ConfigError(f"--output {args.output}: its folder does not exist; make it first")
    name = canonical(args.dataset)
    dataset = open_dataset(find(name, args.data_root))
    if args.path.startswith(PREFIXES):
        if args.mrl or args.efficient or args.rep_size is not None:
            raise config.ConfigError(f"--path {args.path}: a baseline takes no --mrl, --efficient or --rep_size")
        model = load_published(args.path)
    else:
        # the flags of upstream say --mrl --efficient for MRL-E; the checkpoint's own words are mrl and efficient
        model = checkpoint.load_model(args.path, args.mrl and not args.efficient, args.efficient, args.rep_size)
    labelling = match(name, dataset, model)
    kinds = [kind for kind in KINDS if getattr(args, f"save_{kind}")]
    if args.upstream_names and not kinds:
        raise config.ConfigError("--upstream_names: nothing to name; add --save_logits or another --save_*")
    place = Path(args.output).parent if args.output else Path()
    given = model.preprocessing
    if args.preprocessing == "upstream":
        model.preprocessing = Preprocessing(CROP, CROP / RESIZE, given.mean, given.std)
    elif args.preprocessing == "ffcv":
        model.preprocessing = Preprocessing(given.size, 224 / 256, given.mean, given.std)
    from matryoshka.metrics import PrefixAccuracy  # torchmetrics takes seconds to import: not before it is needed

    with distributed.joined(args.device) as world:
        precision = distributed.pick_precision(args.precision, world.device)
        model = model.to(world.device).to(memory_format=torch.channels_last)
        options = {
            "order": "sequential", "num_workers": args.workers, "device": world.device,
            "rank": world.rank, "world": world.size,
        }  # fmt: skip
        if args.preprocessing == "upstream":
            loader = ResizedImages(dataset, args.batch_size * world.size, **options)
        else:
            crop = CenterCrop(model.preprocessing.size, model.preprocessing.ratio)
            loader = Loader(dataset, args.batch_size * world.size, image=crop, **options)
        labelling = labelling.to(world.device)
        started = time.perf_counter()
        metric = PrefixAccuracy(model.dims).to(world.device)
        collected = Collected(kinds)
        bar = tqdm(loader, leave=False, unit="batch", disable=not (world.is_main and sys.stderr.isatty()))
        for raw in predict(model, bar, precision, args.tta):
            prediction = raw._replace(logits=labelling.select(raw.logits), labels=labelling.labels[raw.labels])
            metric.update(prediction.logits, prediction.labels)
            collected.add(prediction)
        accuracy = metric.compute()
        seconds = time.perf_counter() - started
        size = model.preprocessing.size
        settings = [f"{args.preprocessing}{size}", precision]
        variant = "" if dataset.path.name in FOLDERS[name] else dataset.path.name
        names = file_names(kinds, model.spec, args.path, name, variant, settings, args.tta, args.upstream_names)
        for kind, array in collected.arrays(len(dataset), world):
            write_array(place / names[kind], array)

    if world.is_main:
        for note in model.notes:
            print(f"note: {note}")
        print(f"{args.path}: {model.spec.arch}, {model.spec.head_name}, {model.spec.num_classes} classes")
        print(f"{dataset.path}: {name}, {len(dataset):,} images at {size} px{', tta' if args.tta else ''}")
        if labelling.names and len(present := set(labelling.labels.tolist())) < len(labelling.names):
            print(f"note: {len(present)} of the {len(labelling.names)} classes of {name} are there")
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
                "dataset": name,
                "data": str(dataset.path),
                "classes": model.spec.num_classes if labelling.columns is None else len(labelling.columns),
                "images": len(dataset),
                "preprocessing": args.preprocessing,
                "resolution": size,
                "tta": args.tta,
                "precision": precision,
                "images_per_s": len(dataset) / seconds,
                "arrays": names,
            }
            checkpoint.write_atomically(args.output, (json.dumps(results, indent=1) + "\n").encode())
            print(f"results  {args.output}")
        for kind, file in names.items():
            print(f"{kind:11}  {place / file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
