"""Grad-CAM heat maps of every prefix of a checkpoint: one picture for each image.

    python gradcam.py --path runs/demo/mrl/model.safetensors --data runs/demo/val.beton \\
        --output maps
    python gradcam.py --path final_weights.pt --mrl --data holiday/ --output maps \\
        --dims 8,64,2048 --images 50
    matryoshka gradcam --path torchvision:resnet50 --data photo.jpg --output maps --target 207

--data: a .beton file, a folder of class folders, a folder of image files and subfolders (its name
is their class if the model has a class of that name, else they have none; files below --output are
left out), or image files. If there are more than --images images, evenly spaced ones are used. An
image that cannot be read is skipped and reported by name. Images are cropped as in the checkpoint's
evaluation.

Writes <number>_<name>.png for each image, and gradcam.json: a list of {"image": name in the data,
"label": name of the true class or null, "file": name of the picture, "prefixes": {dim:
{"prediction": name, "confidence": 0 to 1, "correct": true, false, or null if the true class is
unknown or not a class of the model}}, "layer": name of the module, "positions": [height, width] of
its map}.
"""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matryoshka import config
from matryoshka.evaluation.options import gradcam_parser as parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import numpy as np
import torch

from matryoshka import checkpoint, devices, distributed
from matryoshka.checkpoint.options import load_flags
from matryoshka.checkpoint.published import load_any
from matryoshka.data import BetonError, BetonFile, CenterCrop, ImageFolder, Loader
from matryoshka.data.augment import normalise
from matryoshka.data.imagenet import CLASSES, wnids
from matryoshka.data.reader import printable
from matryoshka.data.sources import FlatImages, open_images
from matryoshka.data.subset import Subset
from matryoshka.evaluation.heat_maps import MIN_POSITIONS, Layer, find_layer, heat_maps
from matryoshka.evaluation.montage import Cell, montage
from matryoshka.files import write_atomically
from matryoshka.models import NestedModel, widest

BATCH = 16


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    # ---- model, images, classes to explain ----
    model = widest(load_any(args.path, **load_flags(args)))
    source = images_of(args.data, known_class_names(model), args.output)
    dims = chosen_prefixes(args.dims, model.dims)
    classes = readable_class_names(model)
    target_class = parse_target_class(args.target, len(classes))
    chosen = evenly_spaced(len(source), args.images)
    truth = true_classes(source, chosen, model)
    unknown = chosen[truth < 0].tolist()
    if args.target == "label" and unknown:
        raise config.ConfigError(
            f"--target label: {source.path}: the class of {printable(source.name(unknown[0]))} "
            "is not one of the model's; use --target predicted"
        )
    device = distributed.pick_device(args.device, 0)
    devices.choose_kernels(device)
    model = model.to(device)
    loader = Loader(
        some_of(source, chosen),
        BATCH,
        order="sequential",
        crop=CenterCrop(model.preprocessing.size, model.preprocessing.ratio),
        device=device,
        on_error="skip",
    )

    # ---- heat maps, batch by batch ----
    folder = Path(args.output)
    layer = None
    entries: list[dict[str, Any]] = []
    for batch in loader:
        images = normalise(batch.images, model.preprocessing.mean, model.preprocessing.std)
        layer = layer or find_layer(model, images, args.layer)
        labels = torch.from_numpy(truth).to(device)[batch.index]
        if target_class is not None:
            targets = torch.full_like(labels, target_class)
        else:
            targets = labels if args.target == "label" else None
        batch_maps = heat_maps(model, images, targets, layer.name)
        if not bool(torch.isfinite(batch_maps.confidences).all()):
            raise checkpoint.CheckpointError(
                f"--path {args.path}: its outputs are not finite, training has diverged; give an "
                "earlier checkpoint"
            )
        if not entries:  # nothing is written before the first batch has passed all checks
            announce(args, model, layer)
            folder.mkdir(parents=True, exist_ok=True)

        note = footer(args.target, layer, None if target_class is None else classes[target_class])
        maps, predictions, confidences = (tensor.cpu().numpy() for tensor in batch_maps)
        for b, index in enumerate(chosen[batch.index.cpu().numpy()].tolist()):
            label = int(labels[b])
            cells = []
            for dim in dims:
                g = model.dims.index(dim)
                cells.append(
                    Cell(
                        dim=dim,
                        heat=maps[g, b],
                        prediction=classes[predictions[g, b]],
                        confidence=round(float(confidences[g, b]), 6),
                        correct=bool(predictions[g, b] == label) if label >= 0 else None,
                    )
                )
            name = printable(source.name(index))
            true_name = true_class_name(source, index, label, classes)
            picture = render_montage(
                args.format,
                image=batch.images[b].cpu().numpy(),
                title=picture_title(source, name),
                truth=truth_line(true_name, label),
                cells=cells,
                note=note,
            )
            file = f"{index:05d}_{file_name_part(name)}.{args.format}"
            write_atomically(folder / file, picture)
            entries.append(
                {
                    "image": name,
                    "label": true_name,
                    "file": file,
                    "prefixes": by_prefix(cells),
                    "layer": layer.name,
                    "positions": [layer.height, layer.width],
                }
            )

    # ---- results ----
    for skipped in loader.skipped:
        print(
            f"skipped  {source.path}: {printable(skipped.name)}: {skipped.reason}", file=sys.stderr
        )
    if not entries:
        raise BetonError(f"--data {' '.join(args.data)}: none of its images can be read")
    write_atomically(folder / "gradcam.json", (json.dumps(entries, indent=1) + "\n").encode())
    print(f"{len(entries)} of {len(source)} images")
    print(f"pictures  {folder / f'*.{args.format}'}")
    print(f"results   {folder / 'gradcam.json'}")
    return 0


# ---------------------------------------------------------------- options


def parse_target_class(target: str, num_classes: int) -> int | None:
    """The class number of --target; None for predicted and label."""
    if not target.isdecimal():
        return None
    number = int(target)
    if number >= num_classes:
        raise config.ConfigError(f"--target {target}: the model has classes 0 to {num_classes - 1}")
    return number


def chosen_prefixes(requested: tuple[int, ...] | None, dims: tuple[int, ...]) -> list[int]:
    """The requested prefixes of a model, increasing; all of them for None."""
    if requested is None:
        return list(dims)
    chosen = sorted(set(requested))
    unknown = [d for d in chosen if d not in dims]
    if unknown:
        shown = ",".join(map(str, requested))
        raise config.ConfigError(
            f"--dims {shown}: the model has no prefix {unknown[0]}, but {list(dims)}"
        )
    return chosen


# ---------------------------------------------------------------- images


class ImageFiles(ImageFolder):
    """Image files `names` below `root`, readable by a Loader. labels: int64 [N], -1 for unknown."""

    def __init__(
        self, root: Path, names: Sequence[str], labels: np.ndarray, classes: list[str]
    ) -> None:
        # not ImageFolder's constructor: it expects class folders
        self.path = root
        self.classes = classes
        self.labels = labels
        self._names = list(names)


def images_of(paths: Sequence[str], known: Sequence[str], output: str) -> BetonFile | ImageFolder:
    """Open the images of --data.

    Images without classes have that of their folder's name if it is one of `known`, the names of
    the model's classes. Those below `output` are pictures of an earlier run.
    """
    source = open_images(paths)
    if not isinstance(source, FlatImages):
        return source
    names = [source.name(i) for i in range(len(source))]
    made = Path(output).resolve()
    # Files that are named are meant; in the output folder itself, photos may lie beside pictures.
    if Path(paths[0]).is_dir() and made != source.path.resolve():
        names = [n for n in names if made not in (source.path / n).resolve().parents]
    folder = source.path.resolve().name
    if folder in known:
        return ImageFiles(source.path, names, np.zeros(len(names), np.int64), [folder])
    return ImageFiles(source.path, names, np.full(len(names), -1), [])


def some_of(source: BetonFile | ImageFolder, chosen: np.ndarray) -> Subset | ImageFiles:
    """The images `chosen` (int64 [n]), for a Loader that skips unreadable files."""
    if isinstance(source, BetonFile):
        return Subset(source, chosen)
    names = [source.name(i) for i in chosen.tolist()]
    return ImageFiles(source.path, names, source.labels[chosen], source.classes)


def evenly_spaced(total: int, most: int) -> np.ndarray:
    """Up to `most` of 0 .. total - 1, int64, evenly spaced because data is sorted by class."""
    return np.linspace(0, total - 1, min(most, total)).round().astype(np.int64)


# ---------------------------------------------------------------- classes


def known_class_names(model: NestedModel) -> list[str]:
    """The names of the model's classes; empty if unknown.

    Upstream's checkpoints have none; with 1000 classes they are of ImageNet.
    """
    if model.classes:
        return model.classes
    return wnids() if model.spec.num_classes == CLASSES else []


def readable_class_names(model: NestedModel) -> list[str]:
    """A readable name for every class of the model."""
    known = known_class_names(model)
    if not known:
        return [f"class {i}" for i in range(model.spec.num_classes)]
    return [readable(name) for name in known]


def readable(name: str) -> str:
    """ImageNet's WordNet ids in torchvision's words; other names unchanged."""
    return imagenet_words().get(name) or printable(name)


@cache
def imagenet_words() -> dict[str, str]:
    from torchvision.models import ResNet50_Weights

    return dict(zip(wnids(), ResNet50_Weights.DEFAULT.meta["categories"], strict=True))


def true_classes(
    source: BetonFile | ImageFolder, chosen: np.ndarray, model: NestedModel
) -> np.ndarray:
    """The model's class of the images `chosen` (int64 [n]): int64 [n], -1 for unknown.

    Classes are matched by name if both model and data have names, else by number. Folders of
    ImageNet may also be named by number, 0 to 999.
    """
    count = model.spec.num_classes
    labels = source.labels[chosen]
    model_names = known_class_names(model)
    data_names = source.classes
    by_number = data_names is None
    if data_names and not model_names:
        by_number = len(data_names) == count
    if data_names is None or by_number:
        return np.where((labels >= 0) & (labels < count), labels, -1)

    class_of_name = {name: i for i, name in enumerate(model_names)}
    # ImageNet-V2's folders are class numbers. A few folders with numbers may be any classes.
    if model_names == wnids() and len(data_names) == CLASSES:
        class_of_name = {str(i): i for i in range(CLASSES)} | class_of_name
    classes = []
    for label in labels.tolist():
        name = data_names[label] if 0 <= label < len(data_names) else ""
        classes.append(class_of_name.get(name, -1))
    return np.array(classes, np.int64)


def true_class_name(
    source: BetonFile | ImageFolder, index: int, label: int, classes: list[str]
) -> str | None:
    """The name of an image's class in the model or, failing that, in the data.

    label: its class in the model, or -1.
    """
    if label >= 0:
        return classes[label]
    data_label = int(source.labels[index])
    data_names = source.classes
    if data_names is None:
        return None if data_label < 0 else f"class {data_label}"
    return readable(data_names[data_label]) if 0 <= data_label < len(data_names) else None


# ---------------------------------------------------------------- output


def announce(args: SimpleNamespace, model: NestedModel, layer: Layer) -> None:
    for note in model.notes:
        print(f"note: {note}")
    print(
        f"{args.path}: {model.spec.arch}, {model.spec.head_name}, {model.spec.num_classes} classes"
    )
    print(f"maps of {layer.name}, {layer.height} x {layer.width} positions")
    if min(layer.height, layer.width) < MIN_POSITIONS:
        print(
            "note: with this few positions a map localises little; --layer with a module before "
            f"{layer.name} gives more"
        )


def picture_title(source: BetonFile | ImageFolder, name: str) -> str:
    """The name of an image, without its class folder: the class is shown below it."""
    return name if isinstance(source, BetonFile) else Path(name).name


def truth_line(true_name: str | None, label: int) -> str:
    if true_name is None:
        return ""
    return f"true class: {true_name}" if label >= 0 else f"{true_name}: not a class of the model"


def footer(target: str, layer: Layer, class_name: str | None) -> str:
    """Caption of the maps: layer, size, and the explained class."""
    size = f"{layer.height}\N{MULTIPLICATION SIGN}{layer.width}"
    explained = class_name
    if explained is None:
        explained = "each prefix's prediction" if target == "predicted" else "the true class"
    return f"Grad-CAM at {layer.name} ({size}) of {explained}"


def by_prefix(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """The predictions of one image, as in gradcam.json."""
    return {
        str(cell.dim): {
            "prediction": cell.prediction,
            "confidence": cell.confidence,
            "correct": cell.correct,
        }
        for cell in cells
    }


def file_name_part(name: str) -> str:
    """An image's name as part of a file name; `sample 12 (cat/3.jpg)` becomes `3`."""
    return re.sub(r"[^\w.=-]+", "-", Path(name.rstrip(")")).stem)[:60]


def render_montage(kind: str, **inputs: Any) -> bytes:
    """The montage of `inputs` as the contents of a picture file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Names in scripts that matplotlib's font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        montage(**inputs).savefig(buffer, format=kind)
    return buffer.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
