"""Accuracy of every prefix of a checkpoint, all from one forward pass per image.

    python pytorch_inference.py --path runs/demo/mrl/model.safetensors --data-root
    runs/demo/val.beton python pytorch_inference.py --path final_weights.pt --mrl --dataset V1
    --data-root /data/imagenet python pytorch_inference.py --path torchvision:resnet50 --dataset R
    --save_predictions --save_gt

model.safetensors needs no further flag. Upstream's .pt files take upstream's flags: --mrl,
--efficient, --rep_size. Starts under torchrun too: every image is counted once.

--save_* write logits and softmax, float32 [prefixes, images, classes], predictions, int64
[prefixes, images], and labels (gt), int64 [images], in the data set's order; for ImageNet-A, -R and
-O over their 200 classes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from matryoshka import config, distributed
from matryoshka.checkpoint.published import load_any
from matryoshka.data import BetonFile, CenterCrop, ImageFolder, Loader, open_dataset
from matryoshka.data.augment import Preprocessing
from matryoshka.data.imagenet import FOLDERS, OUTSIDE, ImageNetError, canonical, find, find_outside
from matryoshka.data.resized_images import CROP, RESIZE, ResizedImages
from matryoshka.data.subset import Subset
from matryoshka.environment import environment
from matryoshka.evaluation import analysis
from matryoshka.evaluation.imagenet_sets import Labelling, match
from matryoshka.evaluation.options import KINDS
from matryoshka.evaluation.options import eval_parser as parser
from matryoshka.evaluation.predict import predict
from matryoshka.evaluation.retrieval_arrays import retrieval
from matryoshka.evaluation.saved_arrays import Collected, file_names, write_array
from matryoshka.files import write_atomically
from matryoshka.models import NestedModel, with_prefixes
from matryoshka.report.tables import accuracy_table


class Outcome(NamedTuple):
    """Of one data set. accuracy: {prefix: {top1, top5}}. confidence: float32 [G, N], or [G, 0]
    where it was not wanted. not_finite: images with NaN or infinity among their logits. seconds: of
    all; of them `wait` waiting for data.
    """

    accuracy: dict[int, dict[str, float]]
    confidence: np.ndarray
    not_finite: int
    seconds: float
    wait: float


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.retrieval:
        return retrieval(args, print)
    if args.retrieval_array_path or args.random_sample_dim != parser().get_default(
        "random_sample_dim"
    ):
        raise config.ConfigError(
            "--retrieval_array_path and --random_sample_dim are for --retrieval; add it"
        )
    check(args)
    name = canonical(args.dataset)
    if name == "O" and args.ood:
        raise config.ConfigError(
            f"--ood {args.ood}: --dataset O brings its own, {OUTSIDE}/; drop one of the two"
        )
    outside = find_outside(args.data_root) if name == "O" else args.ood
    dataset = open_dataset(find(name, args.data_root))
    strange = open_dataset(outside) if outside else None
    # the flags of upstream say --mrl --efficient for MRL-E; the checkpoint's own words are mrl and
    # efficient
    flags = {
        "mrl": args.mrl and not args.efficient,
        "efficient": args.efficient,
        "rep_size": args.rep_size,
    }
    model = load_any(args.path, **flags, old_ckpt=args.old_ckpt)
    head = model.spec.head_name
    if args.nesting_list is not None:
        with_prefixes(model, args.nesting_list)
    labelling = match(name, dataset, model)
    data = selected(dataset, labelling)
    kinds = [kind for kind in KINDS if getattr(args, f"save_{kind}")]
    if args.upstream_names and not kinds:
        raise config.ConfigError(
            "--upstream_names: nothing to name; add --save_logits or another --save_*"
        )
    place = Path(args.output).parent if args.output else Path()
    set_preprocessing(model, args.preprocessing, args.resolution)

    with distributed.joined(args.device) as world:
        precision = distributed.pick_precision(args.precision, world.device)
        model = model.to(world.device).to(memory_format=torch.channels_last)
        labelling = labelling.to(world.device)
        collected = Collected(kinds)
        outcome = evaluate(
            model, data, labelling, args, world, precision, collected, strange is not None
        )
        accuracy, confidence = outcome.accuracy, outcome.confidence
        if strange is not None:
            nowhere = torch.zeros(strange.num_classes, dtype=torch.int64, device=world.device)
            labels = labelling._replace(labels=nowhere)
            unknown = evaluate(
                model, strange, labels, args, world, precision, Collected([]), True
            ).confidence
            for g, d in enumerate(model.dims if world.is_main else ()):
                accuracy[d] |= analysis.out_of_distribution(confidence[g], unknown[g])._asdict()
        variant = "" if dataset.path.name in FOLDERS[name] else dataset.path.name
        settings = [f"{args.preprocessing}{model.preprocessing.size}", precision]
        names = file_names(
            kinds,
            head,
            model.dims,
            args.path,
            name,
            variant,
            settings,
            args.tta,
            args.upstream_names,
        )
        results = {
            "prefixes": {str(d): values for d, values in accuracy.items()},
            "checkpoint": str(args.path),
            "arch": model.spec.arch,
            "head": head,
            "dims": list(model.dims),
            "dataset": name,
            "data": str(dataset.path),
            "classes": model.spec.num_classes
            if labelling.columns is None
            else len(labelling.columns),
            "class_names": labelling.names or model.classes,
            "images": len(data),
            **(
                {"ood": str(strange.path), "ood_images": len(strange)}
                if strange is not None
                else {}
            ),
            "not_finite": outcome.not_finite,
            "preprocessing": args.preprocessing,
            "resolution": model.preprocessing.size,
            "crop_ratio": model.preprocessing.ratio,
            "tta": args.tta,
            "precision": precision,
            "images_per_s": len(data) / outcome.seconds,
            "data_wait": outcome.wait / outcome.seconds,
            "arrays": names,
            "environment": environment(),
        }
        if world.is_main:
            show(args, results, model, labelling)
        for kind, array in collected.arrays(len(data), world):
            write_array(place / names[kind], array)

    if world.is_main:
        if args.output:
            write_atomically(args.output, (json.dumps(results, indent=1) + "\n").encode())
            print(f"results  {args.output}")
        for kind, file in names.items():
            print(f"{kind:11}  {place / file}")
    return 0


def check(args: Namespace) -> None:
    """ConfigError for options that contradict each other, and for a place that is not writable."""
    if args.resolution is not None and args.preprocessing == "upstream":
        raise config.ConfigError(
            f"--resolution {args.resolution}: --preprocessing upstream always takes {CROP} pixels"
        )
    place = Path(args.output or "results.json").resolve().parent
    if not place.is_dir():
        raise config.ConfigError(
            f"--output {args.output}: its folder does not exist; make it first"
        )
    if args.output and Path(args.output).is_dir():
        raise config.ConfigError(f"--output {args.output}: is a folder; name a file in it")
    if args.output or any(getattr(args, f"save_{kind}") for kind in KINDS):
        try:  # now, not after hours
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise config.ConfigError(
                f"--output: cannot write to {place}: {error.strerror}"
            ) from None


def selected(
    dataset: BetonFile | ImageFolder, labelling: Labelling
) -> BetonFile | ImageFolder | Subset:
    """The images that have a label."""
    counted = labelling.labels.numpy()[dataset.labels] >= 0
    if not counted.any():
        raise ImageNetError(
            f"{dataset.path}: has no images of these classes; give the whole validation set"
        )
    return dataset if counted.all() else Subset(dataset, np.flatnonzero(counted))


def set_preprocessing(model: NestedModel, name: str, resolution: int | None) -> None:
    given = model.preprocessing
    if resolution is not None:
        given = Preprocessing(resolution, given.ratio, given.mean, given.std)
        model.preprocessing = given
    if name == "upstream":
        model.preprocessing = Preprocessing(CROP, CROP / RESIZE, given.mean, given.std)
    elif name == "ffcv":
        model.preprocessing = Preprocessing(given.size, 224 / 256, given.mean, given.std)


def evaluate(
    model: NestedModel,
    data: BetonFile | ImageFolder | Subset,
    labelling: Labelling,
    args: Namespace,
    world: distributed.World,
    precision: str,
    collected: Collected,
    confidences: bool,
) -> Outcome:
    """One pass over the data, every image once on one of the ranks."""
    from matryoshka.evaluation.metrics import (
        PrefixAccuracy,  # torchmetrics takes seconds to import: not before it is needed
    )

    options = {
        "order": "sequential",
        "num_workers": args.workers,
        "device": world.device,
        "rank": world.rank,
        "world": world.size,
    }
    if args.preprocessing == "upstream":
        loader = ResizedImages(data, args.batch_size * world.size, **options)
    else:
        crop = CenterCrop(model.preprocessing.size, model.preprocessing.ratio)
        loader = Loader(data, args.batch_size * world.size, image=crop, **options)
    started = time.perf_counter()
    metric = PrefixAccuracy(model.dims).to(world.device)
    bad = torch.zeros((), dtype=torch.int64, device=world.device)
    highest = [np.empty((len(model.dims), 0), np.float32)]
    bar = tqdm(
        loader, leave=False, unit="batch", disable=not (world.is_main and sys.stderr.isatty())
    )
    for raw in predict(model, bar, precision, args.tta):
        prediction = raw._replace(
            logits=labelling.select(raw.logits), labels=labelling.labels[raw.labels]
        )
        metric.update(prediction.logits, prediction.labels)
        bad += (~prediction.logits.isfinite()).any(2).any(0).sum()
        collected.add(prediction)
        if confidences:
            highest.append(prediction.logits.softmax(2).amax(2).cpu().numpy())
    accuracy = metric.compute()
    seconds = time.perf_counter() - started
    confidence = np.concatenate(distributed.gather(highest, world), 1)
    not_finite = int(distributed.sum_over_ranks(bad, world))
    return Outcome(accuracy, confidence, not_finite, seconds, loader.wait)


def show(args: Namespace, results: dict, model: NestedModel, labelling: Labelling) -> None:
    for note in [] if args.nesting_list and model.head.shared else model.notes:
        print(f"note: {note}")
    print(f"{args.path}: {results['arch']}, {results['head']}, {model.spec.num_classes} classes")
    tta = ", tta" if args.tta else ""
    print(
        f"{results['data']}: {results['dataset']}, {results['images']:,} images at "
        f"{results['resolution']} px{tta}"
    )
    present = set(labelling.labels[labelling.labels >= 0].tolist())
    if labelling.names and len(present) < len(labelling.names):
        print(
            f"note: {len(present)} of the {len(labelling.names)} classes of {results['dataset']} "
            "are there"
        )
    if results["not_finite"]:
        print(
            f"note: {results['not_finite']:,} images have logits that are not finite; the model "
            "diverged"
        )
    if "ood" in results:
        print(
            f"{results['ood']}: {results['ood_images']:,} images of other classes, to be told by "
            "low confidence"
        )
    print(accuracy_table({int(d): values for d, values in results["prefixes"].items()}))
    print(
        f"{results['images_per_s']:.0f} images/s, {100 * results['data_wait']:.0f} % of the time "
        "waiting for data"
    )


if __name__ == "__main__":
    raise SystemExit(main())
