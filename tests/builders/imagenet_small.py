"""A small tree of ImageNet's test sets, a model of its 1000 classes, and evaluation runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matryoshka.inference import pytorch_inference
from PIL import Image

from matryoshka.checkpoint.model_file import save_model
from matryoshka.data.augment import Preprocessing
from matryoshka.models import ModelSpec, build

ROOT = Path(__file__).resolve().parents[2]
INFO = Path(timm.__file__).parent / "data" / "_info"
WNIDS = (INFO / "imagenet_synsets.txt").read_text().split()
SUBSET = {
    s: [int(i) for i in (INFO / f"imagenet_{s.lower()}_indices.txt").read_text().split()]
    for s in "AR"
}
PRESENT = {  # class indices of the folders of each set
    "V1": [0, 7, 999],
    "V2": [2, 10, 100],
    "A": [SUBSET["A"][i] for i in (3, 50, 199)],
    "R": [SUBSET["R"][i] for i in (0, 120, 130)],
    "Sketch": [1, 500, 998],
}
FOLDERS = {
    "V1": "val",
    "V2": "imagenetv2-matched-frequency-format-val",
    "A": "imagenet-a",
    "R": "imagenet-r_",
    "Sketch": "sketch",
}
LIKELY = sorted({i for classes in PRESENT.values() for i in classes})
OUTSIDE = next(i for i in range(1000) if i not in {*SUBSET["A"], *SUBSET["R"], *LIKELY})


def write_tree(root, photo):
    """All five sets, 3 classes of 3, 2 and 4 images each, 32 x 32 pixels."""
    for k, (name, classes) in enumerate(PRESENT.items()):
        for j, c in enumerate(classes):
            place = root / FOLDERS[name] / (str(c) if name == "V2" else WNIDS[c])
            place.mkdir(parents=True)
            for i in range((3, 2, 4)[j]):
                Image.fromarray(photo(32, 32, seed=100 * k + 10 * j + i)).save(place / f"{i}.png")


def write_checkpoint(path):
    """A random model of 1000 classes that prefers the present ones, and one that no set has even
    more.
    """
    torch.manual_seed(0)
    model = build(ModelSpec("resnet10", 1000, (8, 64, 512)))
    model.preprocessing = Preprocessing(size=32, ratio=1.0)
    with torch.no_grad():
        for head in model.head.heads:
            head.bias[LIKELY] += 3 * head.weight.abs().max()
            head.bias[OUTSIDE] += 100
            head.weight *= 3
    save_model(model, path)


def evaluate(checkpoint, data, folder, *more):
    """(results.json, {kind: array}) of a run that saves all arrays into `folder`."""
    folder.mkdir(exist_ok=True)
    output = folder / "results.json"
    save = [f"--save_{kind}" for kind in ("logits", "softmax", "predictions", "gt")]
    argv = [
        f"--path={checkpoint}",
        f"--data-root={data}",
        f"--output={output}",
        "--workers=1",
        "--device=cpu",
    ]
    assert pytorch_inference.main([*argv, "--batch-size=4", *save, *more]) == 0
    results = json.loads(output.read_text())
    load = {".npy": np.load, ".pth": lambda path: torch.load(path, weights_only=True).numpy()}
    arrays = {
        kind: load[Path(file).suffix](folder / file) for kind, file in results["arrays"].items()
    }
    return results, arrays


def refused(argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        pytorch_inference.main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]
