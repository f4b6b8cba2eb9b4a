"""Where every prefix of a checkpoint looks: Grad-CAM heat maps of some images, a picture for each.

    python gradcam.py --path runs/demo/mrl/model.safetensors --data runs/demo/val.beton --output
    maps python gradcam.py --path final_weights.pt --mrl --data holiday/ --output maps --dims
    8,64,2048 --images 50 matryoshka gradcam --path torchvision:resnet50 --data photo.jpg --output
    maps --target 207

--data: a .beton file, a folder of class folders, a folder with image files directly in it (of one
class where it has a class's name), or one image file. Of more than --images those that lie evenly
over the whole set. An image that cannot be read is skipped, with a line that names it. Images are
cropped as in the checkpoint's evaluation.

Writes <number>_<name>.png for each image and gradcam.json, a list of {"image": name in the data,
"label": name of the true class or null, "file": name of the picture, "prefixes": {dim:
{"prediction": name, "confidence": 0 to 1, "correct": true, false, or null where the true class is
not known or not one of the model's}}}.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from matryoshka import checkpoint, config, distributed
from matryoshka.checkpoint.published import load_any
from matryoshka.data import BetonError, BetonFile, CenterCrop, ImageFolder, Loader, open_dataset
from matryoshka.data.augment import normalise
from matryoshka.data.imagenet import CLASSES, wnids
from matryoshka.data.reader import printable
from matryoshka.data.sources import EXTENSIONS
from matryoshka.data.subset import Subset
from matryoshka.evaluation.gradcam import Cell, Layer, find_layer, heat_maps, montage
from matryoshka.evaluation.options import gradcam_parser as parser
from matryoshka.files import write_atomically
from matryoshka.models import NestedModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 16
COARSE = 4  # positions along a side below which a map says little


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    model = load_any(
        args.path,
        mrl=args.mrl and not args.efficient,
        efficient=args.efficient,
        rep_size=args.rep_size,
        old_ckpt=args.old_ckpt,
    )
    source = open_images(args.data, known_names(model))
    dims = chosen_prefixes(args.dims, model.dims)
    classes = class_names(model)
    number = int(args.target) if args.target.isdecimal() else None
    if number is not None and number >= len(classes):
        raise config.ConfigError(
            f"--target {args.target}: the model has classes 0 to {len(classes) - 1}"
        )
    chosen = evenly(len(source), args.images)
    truth = class_indices(source, chosen, model)
    if args.target == "label" and (unknown := chosen[truth < 0].tolist()):
        raise config.ConfigError(
            f"--target label: {source.path}: the class of {printable(source.name(unknown[0]))} "
            "is not one of the "
            "model's; use --target predicted"
        )
    device = distributed.pick_device(args.device, 0)
    model = model.to(device)
    crop = CenterCrop(model.preprocessing.size, model.preprocessing.ratio)
    loader = Loader(
        some_of(source, chosen),
        BATCH,
        order="sequential",
        image=crop,
        device=device,
        on_error="skip",
    )
    folder, layer, shown = Path(args.output), None, []
    for batch in loader:
        images = normalise(batch.images, model.preprocessing.mean, model.preprocessing.std)
        layer = layer or find_layer(model, images, args.layer)
        labels = torch.from_numpy(truth).to(device)[batch.index]
        targets = {"predicted": None, "label": labels}.get(
            args.target, torch.full_like(labels, number or 0)
        )
        found = heat_maps(model, images, targets, layer.name)
        if not bool(torch.isfinite(found.confidences).all()):
            raise checkpoint.CheckpointError(
                f"--path {args.path}: its outputs are not finite, training has diverged; give an "
                "earlier checkpoint"
            )
        if not shown:  # nothing is written before everything is known to be right
            announce(args, model, layer)
            folder.mkdir(parents=True, exist_ok=True)
        maps, predictions, confidences = (tensor.cpu().numpy() for tensor in found)
        for b, index in enumerate(chosen[batch.index.cpu().numpy()].tolist()):
            label, name = int(labels[b]), printable(source.name(index))
            cells = []
            for g in map(model.dims.index, dims):
                correct = bool(predictions[g, b] == label) if label >= 0 else None
                prediction, confidence = (
                    classes[predictions[g, b]],
                    round(float(confidences[g, b]), 6),
                )
                cells.append(Cell(model.dims[g], maps[g, b], prediction, confidence, correct))
            true = true_class(source, index, label, classes)
            line = (
                ""
                if true is None
                else f"true class: {true}"
                if label >= 0
                else f"{true}: no class of the model"
            )
            of = {"predicted": "each prefix's prediction", "label": "the true class"}.get(
                args.target
            )
            size = f"{layer.height}\N{MULTIPLICATION SIGN}{layer.width}"
            note = f"Grad-CAM at {layer.name} ({size}) of {of or classes[number or 0]}"
            title = (
                name if isinstance(source, BetonFile) else Path(name).name
            )  # the class is shown below it
            with (
                warnings.catch_warnings()
            ):  # names in scripts that matplotlib's font lacks are drawn as boxes
                warnings.filterwarnings("ignore", message="Glyph .* missing from font")
                picture = encoded(
                    montage(batch.images[b].cpu().numpy(), title, line, cells, note), args.format
                )
            file = f"{index:05d}_{word(name)}.{args.format}"
            write_atomically(folder / file, picture)
            prefixes = {
                str(c.dim): {
                    "prediction": c.prediction,
                    "confidence": c.confidence,
                    "correct": c.correct,
                }
                for c in cells
            }
            shown.append({"image": name, "label": true, "file": file, "prefixes": prefixes})
    for one in loader.skipped:
        print(f"skipped  {source.path}: {printable(one.name)}: {one.reason}", file=sys.stderr)
    if not shown:
        raise BetonError(f"--data {args.data}: none of its images can be read")
    write_atomically(folder / "gradcam.json", (json.dumps(shown, indent=1) + "\n").encode())
    print(f"{len(shown)} of {len(source)} images")
    print(f"pictures  {folder / f'*.{args.format}'}")
    print(f"results   {folder / 'gradcam.json'}")
    return 0


# ---------------------------------------------------------------- images


class Files(ImageFolder):
    """Image files below `root`, `names` relative to it, as a Loader reads them. Labels int64 [N],
    -1 for unknown.
    """

    def __init__(
        self, root: Path, names: Sequence[str], labels: np.ndarray, classes: list[str]
    ) -> None:
        self.path, self.classes, self.labels = root, classes, labels
        self._names = list(names)


def open_images(path: str, known: Sequence[str]) -> BetonFile | ImageFolder:
    """What --data names. Files that lie directly in a folder are its images; their class is the
    folder's name where that is one of `known`, the names of the model's classes.
    """
    place = Path(path)
    names = []
    if place.is_file() and place.name.lower().endswith(EXTENSIONS):
        place, names = place.parent, [place.name]
    elif place.is_dir():
        names = sorted(
            file.name
            for file in place.iterdir()
            if file.name.lower().endswith(EXTENSIONS)
            and not file.name.startswith(".")
            and file.is_file()
        )
    if not names:
        return open_dataset(path)
    folder = place.resolve().name
    return Files(
        place,
        names,
        np.full(len(names), 0 if folder in known else -1),
        [folder] if folder in known else [],
    )


def some_of(source: BetonFile | ImageFolder, chosen: np.ndarray) -> Subset | Files:
    """`chosen` (int64 [n]) of them, for a Loader that skips what cannot be read."""
    if isinstance(source, BetonFile):
        return Subset(source, chosen)
    names = [source.name(i) for i in chosen.tolist()]
    return Files(source.path, names, source.labels[chosen], source.classes)


def evenly(total: int, most: int) -> np.ndarray:
    """int64: at most `most` of 0 .. total - 1, evenly spaced: data sets are sorted by class."""
    return np.linspace(0, total - 1, min(most, total)).round().astype(np.int64)


# ---------------------------------------------------------------- classes


def class_names(model: NestedModel) -> list[str]:
    """A readable name for every class of the model."""
    return [in_words(name) for name in known_names(model)] or [
        f"class {i}" for i in range(model.spec.num_classes)
    ]


def known_names(model: NestedModel) -> list[str]:
    """The model's names of its classes, or none; upstream's checkpoints lack them, with 1000 they
    are ImageNet's.
    """
    return model.classes or (wnids() if model.spec.num_classes == CLASSES else [])


def in_words(name: str) -> str:
    """ImageNet's WordNet ids in torchvision's words; other names as they are."""
    return words().get(name) or printable(name)


@cache
def words() -> dict[str, str]:
    from torchvision.models import ResNet50_Weights

    return dict(zip(wnids(), ResNet50_Weights.DEFAULT.meta["categories"], strict=True))


def class_indices(
    source: BetonFile | ImageFolder, chosen: np.ndarray, model: NestedModel
) -> np.ndarray:
    """int64 [n]: the model's class of the images `chosen` (int64 [n]), -1 for none.

    By name where both have names; ImageNet's folders may be numbered, 0 to 999. Else the label
    itself.
    """
    count, labels = model.spec.num_classes, source.labels[chosen]
    ours, theirs = known_names(model), source.classes
    if theirs is None or (theirs and not ours and len(theirs) == count):
        return np.where((labels >= 0) & (labels < count), labels, -1)
    known = {name: i for i, name in enumerate(ours)}
    if ours == wnids() and len(theirs) == CLASSES:
        known = {str(i): i for i in range(CLASSES)} | known
    names = (theirs[label] if 0 <= label < len(theirs) else "" for label in labels.tolist())
    return np.array([known.get(name, -1) for name in names], np.int64)


def true_class(
    source: BetonFile | ImageFolder, index: int, label: int, classes: list[str]
) -> str | None:
    """The name of an image's class, as the model or else the data has it; label: its class in the
    model, or -1.
    """
    if label >= 0:
        return classes[label]
    own, theirs = int(source.labels[index]), source.classes
    if theirs is None:
        return None if own < 0 else f"class {own}"
    return in_words(theirs[own]) if 0 <= own < len(theirs) else None


def chosen_prefixes(requested: tuple[int, ...] | None, dims: tuple[int, ...]) -> list[int]:
    """The requested prefixes of a model, increasing; all of them for None."""
    if requested is None:
        return list(dims)
    asked = sorted(set(requested))
    if unknown := [d for d in asked if d not in dims]:
        shown = ",".join(map(str, requested))
        raise config.ConfigError(
            f"--dims {shown}: the model has no prefix {unknown[0]}, but {list(dims)}"
        )
    return asked


# ---------------------------------------------------------------- output


def announce(args: argparse.Namespace, model: NestedModel, layer: Layer) -> None:
    for note in model.notes:
        print(f"note: {note}")
    print(
        f"{args.path}: {model.spec.arch}, {model.spec.head_name}, {model.spec.num_classes} classes"
    )
    print(f"maps of {layer.name}, {layer.height} x {layer.width} positions")
    if min(layer.height, layer.width) < COARSE:
        print(
            "note: so few positions say little about places; an earlier --layer than "
            f"{layer.name} has more"
        )


def word(name: str) -> str:
    """A part of a file's name; of `sample 12 (cat/3.jpg)` the 3."""
    return re.sub(r"[^\w.=-]+", "-", Path(name.rstrip(")")).stem)[:60]


def encoded(picture: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    picture.savefig(file, format=kind)
    return file.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
