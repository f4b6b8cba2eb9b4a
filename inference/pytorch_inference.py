"""Accuracy of every prefix of a checkpoint, from one forward pass per image.

    python pytorch_inference.py --path model.safetensors --data-root val.beton
    python pytorch_inference.py --path final_weights.pt --mrl --dataset V1 --data-root imagenet
    python pytorch_inference.py --path torchvision:resnet50 --dataset R --save_predictions --save_gt
    python pytorch_inference.py --path model.safetensors --dataset cifar10

model.safetensors needs no further flag. Upstream's .pt files take upstream's flags: --mrl,
--efficient, --rep_size. Under torchrun every image is evaluated exactly once.

--save_* write logits and softmax, float32 [prefixes, images, classes], predictions, int64
[prefixes, images], and labels (gt), int64 [images], in data set order; for ImageNet-A, -R and -O
over their 200 classes. --retrieval writes features of queries and database instead.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matryoshka import config
from matryoshka.evaluation.options import eval_parser as parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import numpy as np
import torch
from tqdm import tqdm

from matryoshka import devices, distributed
from matryoshka.checkpoint.options import load_flags
from matryoshka.checkpoint.published import load_any
from matryoshka.data import BetonFile, CenterCrop, ImageFolder, Loader, open_dataset
from matryoshka.data.imagenet import (
    CLASSES,
    FOLDERS,
    OOD_FOLDER,
    ImageNetError,
    find_imagenet_o,
    imagenet_root,
)
from matryoshka.data.resized_images import ResizedImages
from matryoshka.data.subset import Subset
from matryoshka.environment import environment
from matryoshka.evaluation import analysis
from matryoshka.evaluation.embedding import EmbeddingJob, EmbeddingOptions
from matryoshka.evaluation.evaluation_set import OWN, open_evaluation_images
from matryoshka.evaluation.imagenet_sets import LabelMapping, match
from matryoshka.evaluation.options import KINDS, SaveOptions
from matryoshka.evaluation.predict import predict
from matryoshka.evaluation.preprocessing import set_preprocessing
from matryoshka.evaluation.retrieval_arrays import array_path, open_splits, sample, write_arrays
from matryoshka.evaluation.saved_arrays import ArrayCollector, file_names, write_array
from matryoshka.files import write_atomically
from matryoshka.models import NestedModel, multiply_adds, with_prefixes
from matryoshka.report.tables import accuracy_table

Data = BetonFile | ImageFolder | Subset

# Options that --retrieval refuses, because it writes features and no predictions.
NOT_FOR_RETRIEVAL = (
    "split",
    "cache",
    "tta",
    "ood",
    "nesting_list",
    "output",
    "upstream_names",
    *(f"save_{kind}" for kind in KINDS),
)


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check(args)
    if args.retrieval:
        return write_retrieval_arrays(args)

    request = resolve(args)
    with distributed.joined(args.device) as world:
        outcome = evaluate(request, world)
        # On every rank: the names of the arrays are needed below, where all ranks communicate.
        results = results_json(request, outcome)
        if world.is_main:
            print("\n".join(summary(request, results)))
            print(accuracy_table(outcome.accuracy))
            print(speed(results))
        for kind, array in outcome.collector.arrays(len(request.data), world):
            write_array(request.folder / results["arrays"][kind], array)

    if world.is_main:
        if args.output:
            write_atomically(args.output, (json.dumps(results, indent=1) + "\n").encode())
            print(f"results  {args.output}")
        for kind, file in results["arrays"].items():
            print(f"{kind:11}  {request.folder / file}")
    return 0


# ---------------------------------------------------------------- options


def check(args: SimpleNamespace) -> None:
    """ConfigError for options that contradict each other, and for a place that is not writable."""
    default = SaveOptions.random_sample_dim
    if not args.retrieval and (args.retrieval_array_path or args.random_sample_dim != default):
        raise config.ConfigError(
            "--retrieval_array_path and --random_sample_dim are for --retrieval; add it"
        )
    check_output(args)


def check_output(args: SimpleNamespace) -> None:
    """ConfigError if the results cannot be written: before hours of work, not after."""
    folder = Path(args.output or "results.json").resolve().parent
    if not folder.is_dir():
        raise config.ConfigError(
            f"--output {args.output}: its folder does not exist; make it first"
        )
    if args.output and Path(args.output).is_dir():
        raise config.ConfigError(f"--output {args.output}: is a folder; name a file in it")
    if args.output or any(getattr(args, f"save_{kind}") for kind in KINDS):
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise config.ConfigError(
                f"--output: cannot write to {folder}: {error.strerror}"
            ) from None


# ---------------------------------------------------------------- the request


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that the options name, opened and checked."""

    args: SimpleNamespace
    model: NestedModel
    head: str  # of the checkpoint; --nesting-list may leave one prefix of an MRL model
    name: str  # of the data set: a key of FOLDERS, or of a public one
    dataset: Data
    data: Data  # the images of `dataset` that have a label
    mapping: LabelMapping
    ood_dataset: BetonFile | ImageFolder | None  # images of none of the model's classes
    kinds: list[str]  # arrays to save
    folder: Path  # of these arrays


def resolve(args: SimpleNamespace) -> Request:
    """Open data sets and model; raise errors for contradictory options before any forward pass."""
    name, dataset = open_evaluation_images(args, args.path)
    if name == "O" and args.ood:
        raise config.ConfigError(
            f"--ood {args.ood}: --dataset O has its own images, {OOD_FOLDER}/; drop one of the two"
        )
    ood_path = find_imagenet_o(imagenet_root(args.data_root)) if name == "O" else args.ood
    ood_dataset = open_dataset(ood_path) if ood_path else None

    model = load(args)
    head = model.spec.head_name
    if args.nesting_list is not None:
        with_prefixes(model, args.nesting_list)
    mapping = match(name, dataset, model)

    kinds = [kind for kind in KINDS if getattr(args, f"save_{kind}")]
    if args.upstream_names and not kinds:
        raise config.ConfigError(
            "--upstream_names: no array to name; add --save_logits or another --save_*"
        )
    return Request(
        args=args,
        model=model,
        head=head,
        name=name,
        dataset=dataset,
        data=labelled_images(dataset, mapping),
        mapping=mapping,
        ood_dataset=ood_dataset,
        kinds=kinds,
        folder=Path(args.output).parent if args.output else Path(),
    )


def load(args: SimpleNamespace) -> NestedModel:
    """The model of --path with the preprocessing of the options."""
    model = load_any(args.path, **load_flags(args))
    set_preprocessing(model, args.preprocessing, args.resolution)
    return model


def labelled_images(dataset: Data, mapping: LabelMapping) -> Data:
    """The images whose label is one of the evaluated classes."""
    is_labelled = mapping.labels.numpy()[dataset.labels] >= 0
    if not is_labelled.any():
        raise ImageNetError(
            f"{dataset.path}: has no images of these classes; give the whole validation set"
        )
    return dataset if is_labelled.all() else Subset(dataset, np.flatnonzero(is_labelled))


# ---------------------------------------------------------------- evaluation


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of one data set, equal on every rank except for `accuracy`'s OOD columns."""

    accuracy: dict[int, dict[str, float]]  # {prefix: {"top1": percent, "top5": percent, ...}}
    confidence: np.ndarray  # float32 [G, N], or [G, 0] if it was not requested
    collector: ArrayCollector  # this rank's part of the arrays to save
    not_finite: int  # images with NaN or infinity among their logits
    precision: str
    seconds: float
    wait: float  # of these seconds, spent waiting for data


def evaluate(request: Request, world: distributed.World) -> Outcome:
    """Evaluate the data set, and with it the detection of out-of-distribution images."""
    request.model.to(world.device).to(memory_format=torch.channels_last)
    mapping = request.mapping.to(world.device)
    ood_dataset = request.ood_dataset
    outcome = evaluate_images(
        request,
        request.data,
        mapping,
        world=world,
        kinds=request.kinds,
        with_confidence=ood_dataset is not None,
    )
    if ood_dataset is None:
        return outcome

    # Only the confidence of these images counts; their labels are ignored.
    labels = torch.zeros(ood_dataset.num_classes, dtype=torch.int64, device=world.device)
    ood = evaluate_images(
        request,
        ood_dataset,
        mapping._replace(labels=labels),
        world=world,
        kinds=[],
        with_confidence=True,
    )
    if world.is_main:
        for g, d in enumerate(request.model.dims):
            scores = analysis.out_of_distribution(outcome.confidence[g], ood.confidence[g])
            outcome.accuracy[d].update(scores._asdict())
    return outcome


def evaluate_images(
    request: Request,
    data: Data,
    mapping: LabelMapping,
    *,
    world: distributed.World,
    kinds: Sequence[str],
    with_confidence: bool,
) -> Outcome:
    """One pass over the data; every image is evaluated on exactly one rank."""
    # torchmetrics takes seconds to import: option errors must not wait for it
    from matryoshka.evaluation.accuracy import PrefixAccuracy

    args, model = request.args, request.model
    precision = devices.pick_precision(args.precision, world.device)
    loader = make_loader(request, data, world)
    started = time.perf_counter()
    metric = PrefixAccuracy(model.dims).to(world.device)
    collector = ArrayCollector(kinds)
    not_finite = torch.zeros((), dtype=torch.int64, device=world.device)
    confidence = [np.empty((len(model.dims), 0), np.float32)]
    bar = tqdm(
        loader, leave=False, unit="batch", disable=not (world.is_main and sys.stderr.isatty())
    )
    for raw in predict(model, bar, precision, args.tta):
        # Restrict before softmax and top-k: the other outputs of the model do not compete.
        prediction = raw._replace(
            logits=mapping.select(raw.logits),  # [G, B, C]
            labels=mapping.labels[raw.labels],  # [B]
        )
        metric.update(prediction.logits, prediction.labels)
        collector.add(prediction)
        not_finite += (~prediction.logits.isfinite()).any(2).any(0).sum()
        if with_confidence:
            confidence.append(prediction.logits.softmax(2).amax(2).cpu().numpy())  # [G, B]

    accuracy = metric.compute()
    seconds = time.perf_counter() - started
    return Outcome(
        accuracy=accuracy,
        confidence=np.concatenate(distributed.gather(confidence, world), 1),
        collector=collector,
        not_finite=int(distributed.sum_over_ranks(not_finite, world)),
        precision=precision,
        seconds=seconds,
        wait=loader.wait,
    )


def make_loader(request: Request, data: Data, world: distributed.World) -> Loader:
    """Batches of --batch-size images per process, in order, prepared by --preprocessing."""
    args, preprocessing = request.args, request.model.preprocessing
    global_batch = args.batch_size * world.size
    options: dict[str, Any] = {
        "order": "sequential",
        "num_workers": args.workers,
        "device": world.device,
        "rank": world.rank,
        "world": world.size,
    }
    if args.preprocessing == "upstream":
        return ResizedImages(data, global_batch, **options)
    crop = CenterCrop(preprocessing.size, preprocessing.ratio)
    return Loader(data, global_batch, crop=crop, **options)


# ---------------------------------------------------------------- results


def results_json(request: Request, outcome: Outcome) -> dict[str, Any]:
    """The content of --output."""
    args = request.args
    model = request.model
    mapping = request.mapping
    dataset = request.dataset
    images = len(request.data)
    preprocessing = model.preprocessing
    # V2 has variants, and a .beton any name: the file name then includes the folder.
    usual_folder = dataset.path.name in FOLDERS.get(request.name, ())
    arrays = file_names(
        request.kinds,
        head=request.head,
        dims=model.dims,
        checkpoint=args.path,
        dataset=request.name.replace("/", "-").replace(":", "-"),
        variant="" if usual_folder else "-".join([dataset.path.name, *(args.split or "").split()]),
        settings=[f"{args.preprocessing}{preprocessing.size}", outcome.precision],
        tta=args.tta,
        upstream=args.upstream_names,
    )
    ood = {}
    if request.ood_dataset is not None:
        ood = {"ood": str(request.ood_dataset.path), "ood_images": len(request.ood_dataset)}
    classes = model.spec.num_classes if mapping.columns is None else len(mapping.columns)
    return {
        "prefixes": {str(d): values for d, values in outcome.accuracy.items()},
        "checkpoint": str(args.path),
        "arch": model.spec.arch,
        "head": request.head,
        "dims": list(model.dims),
        "dataset": request.name,
        "data": str(dataset.path),
        "split": args.split,
        "macs": {str(d): n for d, n in multiply_adds(model, preprocessing.size).items()},
        "one_pass": model.one_pass,
        "classes": classes,
        "class_names": mapping.names or model.classes,
        "images": images,
        **ood,
        "not_finite": outcome.not_finite,
        "preprocessing": args.preprocessing,
        "resolution": preprocessing.size,
        "crop_ratio": preprocessing.ratio,
        "tta": args.tta,
        "precision": outcome.precision,
        "images_per_s": images / outcome.seconds,
        "data_wait": outcome.wait / outcome.seconds,
        "arrays": arrays,
        "environment": environment(),
    }


def summary(request: Request, results: dict[str, Any]) -> list[str]:
    """Lines above the table: the model, the data, and notes on both."""
    args = request.args
    model = request.model
    mapping = request.mapping
    lines = []
    # Notes on a shared head are about its assumed prefixes, which --nesting-list replaces.
    if not (args.nesting_list and model.head.shared):
        lines += [f"note: {note}" for note in model.notes]
    lines.append(
        f"{args.path}: {results['arch']}, {results['head']}, {model.spec.num_classes} classes"
    )
    tta = ", tta" if args.tta else ""
    is_own = request.name == OWN and model.spec.num_classes != CLASSES
    words = ["" if is_own else f"{request.name}, ", f"{args.split}, " if args.split else ""]
    lines.append(
        f"{results['data']}: {''.join(words)}{results['images']:,} images at "
        f"{results['resolution']} px{tta}"
    )
    present = set(mapping.labels[mapping.labels >= 0].tolist())
    if mapping.names and len(present) < len(mapping.names):
        lines.append(
            f"note: only {len(present)} of the {len(mapping.names)} classes of "
            f"{results['dataset']} are present"
        )
    if results["not_finite"]:
        lines.append(
            f"note: {results['not_finite']:,} images have logits that are not finite; the model "
            "diverged"
        )
    if "ood" in results:
        lines.append(
            f"{results['ood']}: {results['ood_images']:,} images of other classes, detected by "
            "low confidence"
        )
    return lines


def speed(results: dict[str, Any]) -> str:
    return (
        f"{results['images_per_s']:.0f} images/s, {100 * results['data_wait']:.0f} % of the time "
        "waiting for data"
    )


# ---------------------------------------------------------------- --retrieval


def write_retrieval_arrays(args: SimpleNamespace) -> int:
    """Upstream's --retrieval: features of the queries, then of the database, as arrays.

    A data set with more than --random_sample_dim images is sampled, in every run alike. Resumes
    after a kill, as `matryoshka embed` does.
    """
    unsuitable = [option for option in NOT_FOR_RETRIEVAL if getattr(args, option)]
    if unsuitable:
        option = unsuitable[0].replace("nesting_list", "nesting-list")
        raise config.ConfigError(f"--{option} is not for --retrieval")
    prefix = args.retrieval_array_path
    folder = Path(f"{prefix}X").parent
    if not folder.is_dir():
        raise config.ConfigError(
            f"--retrieval_array_path {prefix}: the folder {folder} does not exist; make it first"
        )
    name = (args.dataset or OWN).upper()
    datasets = open_splits(name, imagenet_root(args.data_root))
    model = load(args)
    options = EmbeddingOptions(
        checkpoint=args.path,
        preprocessing=args.preprocessing,
        truncate_dim=model.dims[-1],
        precision=args.precision,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    with distributed.joined(args.device) as world:
        for split, dataset in datasets.items():
            data, labels = sample(name, dataset, args.random_sample_dim)
            job = EmbeddingJob(model, data, options, world=world, labels=labels)
            target = array_path(prefix, name, split, model)
            if world.is_main:
                print("\n".join(job.summary()))
            write_arrays(job, target, report=print)
            if world.is_main:
                print(f"written  {target}-X.npy {target}-y.npy")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
